"""environment.yml and requirements.lock say the same as pyproject.toml."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

CONDA_NAME = {"torch": "pytorch", "dask": "dask-core", "matplotlib": "matplotlib-base"}
LOCKED_EXTRAS = ("test", "dev", "slurm", "hcp")
LOCK_PYTHON = "3.11"


@pytest.fixture(scope="module")
def pyproject(root):
    return tomllib.loads((root / "pyproject.toml").read_text())


def requirements(pyproject, *extras):
    """Canonical name -> requirement, of the runtime and the extras."""
    project = pyproject["project"]
    texts = project["dependencies"] + [text for extra in extras for text in project["optional-dependencies"][extra]]
    return {canonicalize_name(r.name): r for r in map(Requirement, texts)}


@pytest.fixture(scope="module")
def lock_lines(root):
    lines = (root / "requirements.lock").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def locked(lock_lines):
    return dict((canonicalize_name(name), version) for name, version in (line.split("==") for line in lock_lines))


def test_conda_environment_lists_the_runtime_and_test_requirements(root, pyproject):
    entries = yaml.safe_load((root / "environment.yml").read_text())["dependencies"]
    by_pip = next(entry["pip"] for entry in entries if isinstance(entry, dict))
    pypi_name = {conda: name for name, conda in CONDA_NAME.items()}
    conda = {r.name: r for r in map(Requirement, [entry for entry in entries if isinstance(entry, str)])}
    python, build, _ = conda.pop("python"), conda.pop("setuptools"), conda.pop("pip")
    listed = {pypi_name.get(name, name): r.specifier for name, r in conda.items()} | {r.name: r.specifier for r in map(Requirement, by_pip)}
    assert listed == {name: requirement.specifier for name, requirement in requirements(pyproject, "test").items()}
    assert python.specifier == SpecifierSet(pyproject["project"]["requires-python"])
    assert [str(build)] == pyproject["build-system"]["requires"]


def test_lock_is_pins_only(lock_lines):
    # No registry, no path, no local build label: the same file serves every machine.
    odd = [line for line in lock_lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line)]
    assert odd == []
    assert len(lock_lines) == len({line.split("==")[0].lower() for line in lock_lines})


def test_lock_satisfies_pyproject(pyproject, locked):
    wanted = requirements(pyproject, *LOCKED_EXTRAS) | {"setuptools": Requirement(pyproject["build-system"]["requires"][0])}
    unmet = {str(r): locked.get(name) for name, r in wanted.items() if name not in locked or not r.specifier.contains(locked[name], prereleases=True)}
    assert unmet == {}
    assert LOCK_PYTHON in SpecifierSet(pyproject["project"]["requires-python"])


@pytest.mark.parametrize("library", ["arviz_plots", "arviz_stats", "distributed", "obstore", "safetensors.torch", "zarr", "zuko"])
def test_pinned_libraries_import_together(library):
    # In a fresh interpreter: importing some of them changes process-wide settings.
    subprocess.run([sys.executable, "-c", f"import {library}"], check=True, timeout=120)


def test_lock_pins_torch_exactly(locked):
    assert locked["torch"] == "2.13.0"


def test_lock_is_complete(locked):
    """Each installed requirement of each locked package is locked too (checked on the environment the lock has made)."""
    missing = {}
    for name, version in locked.items():
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            pytest.skip(f"this environment was not made from the lock: {name} is not installed")
        if distribution.version.split("+")[0] != version:
            pytest.skip(f"this environment was not made from the lock: {name} {distribution.version}, locked {version}")
        for text in distribution.requires or ():
            needed = Requirement(text)
            if (needed.marker is None or needed.marker.evaluate({"extra": ""})) and canonicalize_name(needed.name) not in locked:
                missing[f"{name}: {needed}"] = "not locked"
    # The accelerator packages that a torch build of another kind asks for are not part of a lock for the CPU.
    assert {k: v for k, v in missing.items() if not k.startswith("torch:")} == {}

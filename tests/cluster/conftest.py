"""Studies, commands and digests that the cluster tests share."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from pipelines import gre
from pipelines.hcp import make_cohort as make_hcp

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def command(*arguments, python=sys.executable):
    return [python, "-m", "pavi_scale.cli", *map(str, arguments)]


def call(folder, *arguments, timeout=900, **more):
    """The command, in a process of its own, to its end."""
    return subprocess.run(command(*arguments), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, **more)


def spawn(folder, *arguments, **more):
    """The command, in a process of its own; what it says goes to a file beside the run."""
    with (folder / "driver.log").open("ab") as out:
        return subprocess.Popen(command(*arguments), cwd=folder, env=ENVIRONMENT, stdout=out, stderr=out, start_new_session=True, **more)


def write_study(folder, name, cohort, run, cluster=None, **fit):
    """A study file; returns its name."""
    study = {"model": f"pipelines.{name}:model", "cohort": str(cohort), "run": str(run), "fit": {"seed": 3} | fit}
    (folder / f"{Path(run).name}.yaml").write_text(yaml.safe_dump(study | ({"cluster": str(cluster)} if cluster else {})))
    return f"{Path(run).name}.yaml"


def digest(run):
    """SHA-256 of weights, tables and posterior of a finished run."""
    run = Path(run)
    pointer = json.loads((run / "run.json").read_text())
    number = pointer.get("content", pointer)["generation"]
    found = hashlib.sha256((run / "generations" / f"{number:06d}" / "weights.safetensors").read_bytes())
    for path in sorted(p for p in (run / "posterior.zarr").rglob("*") if p.is_file()):
        found.update(str(path.relative_to(run)).encode() + path.read_bytes())
    return found.hexdigest()


def events(run, *names):
    """Events of a run's log, those of some names only if any are given."""
    path = Path(run) / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [e for e in found if not names or e["event"] in names]


def wait_for(what, seconds=60.0, every=0.05):
    """The first true value of `what()`."""
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, f"waited {seconds} s in vain"
        time.sleep(every)
    return found


@pytest.fixture(scope="session")
def tools():
    return SimpleNamespace(
        call=call, spawn=spawn, command=command, write_study=write_study, digest=digest, events=events, wait_for=wait_for, environment=ENVIRONMENT, root=ROOT
    )


@pytest.fixture(scope="session")
def gre_cohort(tmp_path_factory):
    """Gaussian random effects, a second of work or so."""
    path = tmp_path_factory.mktemp("gre") / "cohort.zarr"
    gre.make_cohort(str(path), groups=2000, observations=20, features=4)
    return path


@pytest.fixture(scope="session")
def hcp_cohort(tmp_path_factory):
    """The cortical study, small: not conjugate, with free rows."""
    path = tmp_path_factory.mktemp("hcp") / "cohort.zarr"
    make_hcp(str(path), subjects=4, vertices=200, sessions=2, features=4)
    return path

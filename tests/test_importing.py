"""The model of a run that a script has made: how it is had again without what else the script does."""

import runpy
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import xarray as xr

import pavi_scale as ps
from pavi_scale import recording
from pavi_scale.errors import RunError

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
from __future__ import annotations
from dataclasses import dataclass
from pathlib import Path
import numpy as np
import xarray as xr
from torch.distributions import Normal
import pavi_scale as ps
from neighbour import SCALE

@dataclass
class Sizes:
    n: int = 4

here = Path(__file__).parent
model = ps.Model(ps.Plate("i"), a=ps.latent(lambda: Normal(0.0, 5.0)), y=ps.observed(lambda a: Normal(a, SCALE), plates="i"))
cohort = xr.Dataset({"y": ("i", np.arange(float(Sizes().n)))})
posterior = ps.fit(model, cohort, run=here / "run", seed=0, progress=False)
with (here / "after").open("a") as after:
    after.write(posterior.status)
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A script beside a module of its own; called, it is run as `python study.py` does, and forgotten."""
    (tmp_path / "neighbour.py").write_text("SCALE = 0.5\ndef elsewhere(held):\n    return lambda a: held(a)\n")
    path = tmp_path / "study.py"
    path.write_text(SCRIPT)

    def run(text=SCRIPT):
        path.write_text(text)
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(tmp_path))
            runpy.run_path(str(path), run_name="__main__")
        sys.modules.pop("neighbour")
        monkeypatch.setattr(recording, "_known", weakref.WeakValueDictionary())
        return path

    return run


def test_a_script_that_fits_is_opened_without_fitting_again(script, tmp_path):
    script()
    before = list(sys.path)
    assert ps.open_posterior(tmp_path / "run").status == "ok"
    assert ps.resume(tmp_path / "run", progress=False).status == "ok"
    assert abs(float(xr.open_datatree(tmp_path / "run", engine="pavi")["posterior"]["a"].mean()) - 1.5) < 0.1
    assert (tmp_path / "after").read_text() == "ok"  # once
    assert sys.path == before
    assert not [name for name in sys.modules if name.startswith("_pavi_")]


def test_in_another_process_and_folder(script, tmp_path):
    script()
    code = f"import pavi_scale as ps; print(ps.open_posterior({str(tmp_path / 'run')!r}).status)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert out.stdout.strip() == "ok", out.stderr[-2000:]


@pytest.mark.parametrize("call", ["ps.open_posterior(here / 'run')", "ps.resume(here / 'run')", "xr.open_datatree(here / 'run', engine='pavi')"])
def test_a_script_that_opens_its_run_does_not_open_itself(script, tmp_path, call):
    path = script()
    fit = next(line for line in SCRIPT.splitlines() if line.startswith("posterior ="))
    path.write_text(SCRIPT.replace(fit, f"try:\n    posterior = {call}\nexcept Exception:\n    (here / 'after').unlink()"))
    assert ps.open_posterior(tmp_path / "run").status == "ok"
    assert (tmp_path / "after").exists()


def test_a_changed_script_is_refused(script, tmp_path):
    path = script()
    path.write_text(SCRIPT.replace("Normal(0.0, 5.0)", "Normal(0.0, 4.0)"))
    with pytest.raises(RunError, match="the model has changed since the run"):
        ps.open_posterior(tmp_path / "run")


@pytest.mark.parametrize(
    ("line", "got"),
    [
        ("open('/nowhere/table.csv')", "FileNotFoundError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("ps.fit(None, None)", "a fit before it"),
    ],
)
def test_a_script_that_does_not_get_to_its_model(script, tmp_path, line, got):
    """One error that names the file and what to do."""
    path = script()
    path.write_text(SCRIPT.replace("here = ", f"{line}\nhere = ", 1))
    with pytest.raises(RunError, match="the run's model cannot be imported") as raised:
        ps.open_posterior(tmp_path / "run")
    assert str(path) in str(raised.value)
    assert got in str(raised.value)
    assert "__main__" in str(raised.value)
    assert "model=" in str(raised.value)


def test_a_typed_model_is_to_be_passed(tmp_path, monkeypatch):
    """Of what came from standard input there is no file."""
    monkeypatch.setattr(recording, "_known", weakref.WeakValueDictionary())
    text = SCRIPT.replace("from neighbour import SCALE", "SCALE = 0.5").replace("Path(__file__).parent", f"Path({str(tmp_path)!r})")
    subprocess.run([sys.executable, "-"], input=text, text=True, check=True, cwd=ROOT)
    with pytest.raises(RunError, match="no file: it was typed.*pass model="):
        ps.open_posterior(tmp_path / "run")


HELD = """
from typing import NamedTuple

class Offset:
    def __init__(self, by):
        self.by = by
    def __call__(self, a):
        return Normal(a + self.by, SCALE)

class Pair(NamedTuple):
    offset: Offset

def law_of(*held):
    def law(a):
        return held[0](a) if isinstance(held[0], Offset) else held[0].offset(a)
    return law

def factory(held):
    return lambda a: held(a)
"""


HOLDING = ["law_of(Offset(1.0))", "law_of(Pair(Offset(1.0)))", "factory(Offset(1.0))", "elsewhere(Offset(1.0))", "Offset(1.0)"]


@pytest.fixture
def holding(script):
    """`script`, its law one of `HOLDING`."""
    text = SCRIPT.replace("import SCALE", "import SCALE, elsewhere").replace("here = ", f"{HELD}\nhere = ", 1)
    return lambda law: script(text.replace("lambda a: Normal(a, SCALE)", law))


@pytest.mark.parametrize("law", HOLDING)
def test_a_law_that_holds_an_object_of_its_script_has_not_changed(holding, tmp_path, law):
    """The script's classes belong to another module whenever it is executed, and objects lie at other addresses."""
    holding(law)
    assert abs(float(ps.open_posterior(tmp_path / "run").datatree["posterior_mean"]["a"]) - 0.5) < 0.1


@pytest.mark.parametrize("law", HOLDING[:-1])
def test_a_law_that_holds_an_object_of_another_class_has_changed(holding, tmp_path, law):
    path = holding(law)
    path.write_text(path.read_text().replace(law, law.replace("Offset(1.0)", "Sizes()")))
    with pytest.raises(RunError, match="the model has changed since the run"):
        ps.open_posterior(tmp_path / "run")

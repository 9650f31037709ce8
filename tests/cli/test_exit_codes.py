"""Every way of being called wrongly: the exit code, one sentence on standard error, nothing written."""

import warnings

import numpy as np
import pytest
import xarray as xr
import yaml
from zarr.errors import UnstableSpecificationWarning

STUDY = {"model": "toystudy:model", "cohort": "cohort.zarr", "run": "runs/toy", "fit": {"seed": 0, "progress": False}}


def text(**changes):
    return yaml.safe_dump({key: value for key, value in (STUDY | changes).items() if value is not None})


# name -> (study text, words that the message must hold)
STUDIES = {
    "unknown key": (text(modle="x:y"), ("unknown study key", "'modle'", "did you mean 'model'?")),
    "unknown fit key": (text(fit={"sed": 1}), ("unknown study key", "'fit.sed'", "'seed'")),
    "missing key": (text(run=None), ("study key is missing", "'run'")),
    "wrong type": (text(cohort=3), ("wrong value", "'cohort'", "3")),
    "negative seed": (text(fit={"seed": -1}), ("'fit.seed'", "greater than or equal to 0")),
    "seed in words": (text(fit={"seed": "one"}), ("'fit.seed'", "one")),
    "unreadable memory": (text(fit={"memory": "lots"}), ("not a size in bytes", "lots")),
    "unknown encoding": (text(fit={"encoding": "fancy"}), ("encoding", "fancy")),
    "encoding of no plate": (text(fit={"encoding": {"planet": "free"}}), ("encoding", "planet")),
    "no mapping": ("- a\n- b\n", ("a study file is a mapping",)),
    "empty file": ("", ("a study file is a mapping",)),
    "broken yaml": ("model: [a\n", ("not readable as YAML", "line 2")),
    "yaml tag": ("model: !!python/object/apply:os.system ['touch canary']\n", ("not readable as YAML",)),
    "yaml alias": ("model: &a x\nrun: *a\n", ("aliases are not allowed",)),
    "key twice": ("model: a:b\nmodel: c:d\n", ("key 'model' is there twice",)),
    "control character": ("model: \x00\n", ("not readable as YAML",)),
    "deep nesting": ("[" * 5000, ("not readable as YAML",)),
    "bad date": ("model: 2001-99-99\n", ("not readable as YAML",)),
    "no colon": (text(model="toystudy"), ("not an import path", "module:attribute")),
    "path as a model": (text(model="../evil.py:model"), ("not an import path",)),
    "no module": (text(model="nowhere:model"), ("cannot be imported", "nowhere")),
    "no attribute": (text(model="toystudy:modle"), ("does not lead to a model", "toystudy:model")),
    "not a model": (text(model="toystudy:number"), ("does not lead to a model", "int")),
    "failing module": (text(model="broken:model"), ("cannot be imported", "ZeroDivisionError")),
    "module that exits": (text(model="quits:model"), ("cannot be imported", "SystemExit")),
    "module that fits": (text(model="fits:model"), ("does more than make it", "a fit, resumption or opening", "__main__")),
    "cyclic model": (text(model="cyclic:model"), ("the model is cyclic", "a -> b -> a")),
    "no cohort": (text(cohort="absent.zarr"), ("cohort store cannot be read", "absent.zarr")),
    "cohort is a file": (text(cohort="study.yaml"), ("cohort store cannot be read",)),
    "no cluster file": (text(cluster="absent.yaml"), ("cluster file cannot be read", "absent.yaml")),
    "unknown cluster kind": (text(cluster="mars.yaml"), ("cluster key", "'kind'", "mars")),
    "no workers": (text(cluster="empty.yaml"), ("cluster key", "'workers'")),
}


@pytest.fixture
def place(folder):
    (folder / "broken.py").write_text("1 / 0\n")
    (folder / "quits.py").write_text("raise SystemExit('bye')\n")
    (folder / "fits.py").write_text("from toystudy import model\nimport pavi_scale as ps\nps.fit(model, 'cohort.zarr', run='inner', progress=False)\n")
    law = "lambda {}: __import__('torch').distributions.Normal(0.0, 1.0)"
    (folder / "cyclic.py").write_text(f"import pavi_scale as ps\nmodel = ps.Model(a=ps.latent({law.format('b')}), b=ps.latent({law.format('a')}))\n")
    (folder / "mars.yaml").write_text("kind: mars\n")
    (folder / "empty.yaml").write_text("{kind: local, workers: 0}\n")
    return folder


def one_sentence(err):
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize("case", STUDIES)
@pytest.mark.parametrize("command", ["fit", "plan"])
def test_bad_study(place, run, command, case):
    content, words = STUDIES[case]
    (place / "bad.yaml").write_text(content)
    code, out, err = run(command, "bad.yaml")
    assert (code, out) == (2, "")
    one_sentence(err)
    assert all(word in err for word in words), err
    assert not (place / "runs").exists()
    assert not (place / "canary").exists()


DATA = {
    "nan": (lambda c: c.assign(x=c.x.where(c.obs != 3)), ("x",)),
    "infinite": (lambda c: c.assign(x=c.x.where(c.obs != 3, np.inf)), ("x", "inf")),
    "index out of range": (lambda c: c.assign(obs_group=("obs", c.obs_group.values + 9, c.obs_group.attrs)), ("index out of range",)),
    "missing variable": (lambda c: c.drop_vars("x"), ("'x'",)),
    "wrong dimension": (lambda c: c.assign(x=("planet", c.x.values)), ("wrong dimensions",)),
    "no index": (lambda c: c.drop_vars("obs_group"), ("index variable is missing",)),
}


@pytest.mark.parametrize("case", DATA)
@pytest.mark.parametrize("command", ["fit", "check"])
def test_bad_cohort(folder, run, command, case):
    spoil, words = DATA[case]
    spoil(xr.open_zarr(folder / "cohort.zarr", consolidated=False).load()).drop_encoding().to_zarr(folder / "bad.zarr", zarr_format=3, consolidated=False)
    code, _, err = run(command, "study.yaml", "--set", "cohort=bad.zarr")
    assert code == 2
    one_sentence(err)
    assert all(word in err for word in words), err
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("command", ["plan", "fit", "check"])
def test_values_that_the_law_cannot_take(folder, run, command):
    text = (folder / "toystudy.py").read_text()
    (folder / "counts.py").write_text(text.replace("HalfNormal, Normal", "HalfNormal, Normal, Poisson").replace("Normal(theta, 0.5)", "Poisson(theta.exp())"))
    cohort = xr.open_zarr(folder / "cohort.zarr", consolidated=False).load()
    counts = np.ones(cohort.sizes["obs"])
    counts[7] = 0.5
    cohort.assign(x=("obs", counts)).drop_encoding().to_zarr(folder / "bad.zarr", zarr_format=3, consolidated=False)
    code, _, err = run(command, "study.yaml", "--set", "cohort=bad.zarr", "--set", "model=counts:model")
    assert code == 2
    one_sentence(err)
    assert "outside the support" in err
    assert "obs=7" in err


@pytest.mark.parametrize("consolidated", [False, True])
def test_text_labels_that_xarray_wrote_are_no_news(folder, run, consolidated):
    """Zarr's warning about text of fixed length does not stand above the one sentence, nor above a result."""
    data = xr.open_zarr(folder / "cohort.zarr", consolidated=False).load()
    data = data.drop_encoding().assign_coords(group=data.group.values.astype(object).astype("U"))
    for name, cohort in {"good": data, "bad": data.drop_vars("x")}.items():
        cohort.to_zarr(folder / f"{name}.zarr", zarr_format=3, consolidated=consolidated)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnstableSpecificationWarning)
        for command in ("plan", "fit", "check"):
            code, _, err = run(command, "study.yaml", "--set", "cohort=bad.zarr")
            assert code == 2
            one_sentence(err)
        for command in ("plan", "fit", "posterior", "check", "report"):
            assert run(command, "study.yaml", "--set", "cohort=good.zarr")[0] == 0


CALLS = {
    "no file": (["fit", "absent.yaml"], "study file cannot be read"),
    "folder as file": (["fit", "."], "study file cannot be read"),
    "setting without value": (["fit", "study.yaml", "--set", "fit.seed"], "a setting is `key=value`"),
    "unknown setting": (["fit", "study.yaml", "--set", "fit.sede=1"], "did you mean 'seed'"),
    "setting below a value": (["fit", "study.yaml", "--set", "run.seed=1"], "below a key that has no keys"),
    "setting with a tag": (["fit", "study.yaml", "--set", "fit.seed=!!python/name:os.system"], "not readable as YAML"),
    "absent cluster": (["fit", "study.yaml", "--cluster", "absent.yaml"], "cluster file cannot be read"),
    "resume of nothing": (["resume", "study.yaml"], "there is no run"),
    "posterior of nothing": (["posterior", "study.yaml"], "there is no run"),
    "report of nothing": (["report", "study.yaml"], "there is no run"),
    "remote run": (["fit", "study.yaml", "--set", "run=s3://bucket/run"], "local directory"),
    "run is a file": (["fit", "study.yaml", "--set", "run=study.yaml"], "run path cannot be written"),
    "run below a file": (["fit", "study.yaml", "--set", "run=study.yaml/run"], "run path cannot be written"),
}


@pytest.mark.parametrize("case", CALLS)
def test_bad_call(folder, run, case):
    arguments, words = CALLS[case]
    code, _, err = run(*arguments)
    assert code == 2
    one_sentence(err)
    assert words in err, err


@pytest.mark.parametrize("arguments", [["fly", "study.yaml"], ["fit"], ["fit", "study.yaml", "--speed", "9"], ["fit", "study.yaml", "other.yaml"]])
def test_wrong_usage(folder, run, arguments):
    code, _, err = run(*arguments)
    assert code == 2
    assert "Usage: pavi-scale" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["plan", "fit"])
def test_refused_by_the_plan(folder, run, command):
    code, _, err = run(command, "study.yaml", "--set", "fit.memory=100 MiB")
    assert code == 3
    one_sentence(err)
    assert "100.0 MiB" in err
    assert not (folder / "runs").exists()

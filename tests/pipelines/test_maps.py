"""Maps of a posterior whose moments and draws are known: label probabilities, entropies, and the files that hold them."""

import json
from dataclasses import dataclass, replace

import nibabel as nib
import numpy as np
import pytest
import xarray as xr
from nibabel.cifti2 import LabelAxis, ScalarAxis
from scipy.integrate import quad
from scipy.special import expit, softmax
from scipy.stats import norm

from pavi_scale.errors import InputError, PlanRefused
from pavi_scale.plates import Layout
from pavi_scale.posterior.posterior import Posterior
from pavi_scale.posterior.sampler import Context
from pavi_scale.posterior.store import PosteriorWriter
from pavi_scale.rng import normal, stream
from pavi_scale.run import Run
from pipelines.hcp import maps, model, storing
from pipelines.hcp.surfaces import CORTEX, Surface, form_of, values_of

SIZES = {"subject": 3, "session": 2, "vertex": 30}
EVENTS = {"network": 7, "feature": 2}
SURFACE = Surface(
    np.asarray([CORTEX[0]] * 18 + [CORTEX[1]] * 12, dtype=object), np.asarray([*range(2, 20), *range(0, 24, 2)], dtype=np.int32), {CORTEX[0]: 25, CORTEX[1]: 25}
)


def shape(name):
    v = model.variables[name]
    return tuple((SIZES | EVENTS)[d] for d in (*v.plates, *v.dims))


def moments(name):
    rng = np.random.default_rng(stream(0, name))
    return 2 * rng.standard_normal(shape(name)), rng.uniform(0.2, 1.5, shape(name))


@dataclass(frozen=True)
class Known:
    """Independent normals with the stored moments."""

    seed: int = 0

    def draw(self, names, draws, units):
        out = {}
        for name in names:
            mean, sd = moments(name)
            v = model.variables[name]
            at = np.ix_(*(units.get(p, np.arange(SIZES[p])) for p in v.plates), *(np.arange(EVENTS[d]) for d in v.dims))
            number = np.arange(mean.size).reshape(mean.shape)[at]
            out[name] = mean[at] + sd[at] * normal(stream(self.seed, name), draws.reshape(-1, *[1] * mean.ndim), number[None])
        return out

    def with_seed(self, seed):
        return replace(self, seed=seed)


@pytest.fixture(scope="module", params=["surface", "plain"])
def posterior(request, tmp_path_factory):
    coords = {"subject": ["a b", "c", "d"]}
    if request.param == "surface":
        coords |= {"structure": ("vertex", SURFACE.structure, {"mesh_vertices": dict(SURFACE.sizes)}), "surface_vertex": ("vertex", SURFACE.index)}
    data = xr.Dataset({"x": (("subject", "session", "vertex", "feature"), np.zeros((3, 2, 30, 2)))}, coords)
    context = Context(Known(), model, data, Layout(model.plates, SIZES, {}), EVENTS, {"subject": np.asarray(coords["subject"])})
    path = tmp_path_factory.mktemp("maps") / "run"
    run = Run.create(path)
    run.commit({"w": np.zeros(1)}, {"status": "ok", "elbo": 0.0, "draws": 4000})
    writer = PosteriorWriter.create(path, context)
    for v in model.latents:
        writer.write(v.name, {}, *moments(v.name))
    writer.finish()
    return Posterior(run, context)


def test_label_probability_is_the_expected_softmax():
    """Of two networks it is a logistic-normal mean: against adaptive quadrature."""
    rng = np.random.default_rng(0)
    mean, sd = 2 * rng.standard_normal((40, 2)), rng.uniform(0.1, 1.5, (40, 2))
    found = maps.label_probability(mean, sd)
    for (a, b), (s, t), p in zip(mean, sd, found, strict=True):
        d, e = a - b, np.hypot(s, t)
        exact = quad(lambda z, d=d, e=e: expit(d + e * z) * norm.pdf(z), -9, 9)[0]
        assert p[0] == pytest.approx(exact, abs=0.01)
        assert abs(expit(d) - exact) < 0.25
    np.testing.assert_allclose(found.sum(1), 1.0, rtol=1e-6)
    assert np.abs(expit(mean[:, 0] - mean[:, 1]) - found[:, 0]).max() > 0.03  # leaving the spread out would be noticed


def test_entropy():
    assert maps.entropy(np.full((1, 7), 1 / 7)) == pytest.approx(np.log(7))
    assert maps.entropy(np.eye(7)) == pytest.approx(np.zeros(7), abs=1e-12)


def expected(name, draws):
    """Label probabilities from a great many draws, or from the very draws."""
    return softmax(Known().draw([name], np.arange(draws or 4000), {})[name], -1).mean(0)


@pytest.mark.parametrize("draws", [0, 300])
def test_maps_hold_the_probabilities(posterior, tmp_path, draws):
    steps = []
    files = maps.write_maps(posterior, tmp_path / "out", draws=draws, tell=lambda *step: steps.append(step))
    assert steps[-1] == ("maps", 3, 3)
    assert sorted(p.relative_to(tmp_path / "out").as_posix() for p in files) == sorted(
        f"{stem}_{kind}" for stem in ("group", "sub-ab/sub-ab", "sub-c/sub-c", "sub-d/sub-d") for kind in ("dseg.dlabel.nii", "probseg.dscalar.nii")
    )
    truth = {"group": expected("rho", draws)} | dict(zip(("sub-ab", "sub-c", "sub-d"), expected("label_logits", draws), strict=True))
    tolerance = 1e-6 if draws else 0.02
    for name, probability in truth.items():
        stem = tmp_path / "out" / name if name == "group" else tmp_path / "out" / name / name
        scalars, labels = (nib.load(f"{stem}_{kind}") for kind in ("probseg.dscalar.nii", "dseg.dlabel.nii"))
        found = np.asarray(scalars.dataobj)
        np.testing.assert_allclose(found[2:].T, probability, atol=tolerance)
        np.testing.assert_allclose(found[0], found[2:].max(0), rtol=1e-6)
        np.testing.assert_allclose(found[1], maps.entropy(probability), atol=7 * tolerance)
        np.testing.assert_array_equal(np.asarray(labels.dataobj)[0], found[2:].argmax(0) + 1)
        rows = scalars.header.get_axis(0)
        assert isinstance(rows, ScalarAxis)
        assert list(rows.name[:3]) == ["probability", "entropy (nats)", "network 1"]
        assert (f"{draws} draws" if draws else "stored means") in rows.meta[0]["Description"]
        assert isinstance(labels.header.get_axis(0), LabelAxis)
        assert labels.header.get_axis(0).label[0][7][0] == "network 7"
        assert labels.nifti_header.get_intent()[0] == "ConnDenseLabel"
        assert scalars.nifti_header.get_intent()[0] == "ConnDenseScalar"
    assert json.loads((tmp_path / "out" / "dataset_description.json").read_text())["DatasetType"] == "derivative"


def test_maps_lie_where_the_cohort_lay(posterior, tmp_path):
    files = maps.write_maps(posterior, tmp_path, subjects=["c"])
    assert {p.parent.name for p in files[2:]} == {"sub-c"}
    known = "structure" in posterior.datatree["observed_data"].coords
    form = form_of([tmp_path / "group_probseg.dscalar.nii"])
    assert form.surface.differs(SURFACE if known else Surface.plain(30)) is None
    assert values_of([tmp_path / "group_probseg.dscalar.nii"]).shape == (30, 9)


def test_bad_requests(posterior, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no such subject"):
        maps.write_maps(posterior, tmp_path / "m", subjects=["zoe"])
    with pytest.raises(InputError, match="as many draws"):
        maps.write_maps(posterior, tmp_path / "m", draws=5000)
    assert not (tmp_path / "m").exists()
    monkeypatch.setattr(storing.shutil, "disk_usage", lambda path: storing.shutil._ntuple_diskusage(10, 9, 1000))
    with pytest.raises(PlanRefused, match="GB free"):
        maps.write_maps(posterior, tmp_path / "n")
    assert not (tmp_path / "n").exists()


def test_names_of_files_stay_in_the_folder(posterior, tmp_path):
    odd = xr.Dataset({"label_logits": (("subject", "vertex", "network"), np.zeros((3, 1, 7)))}, {"subject": ["../a", "a", "b"]})
    assert maps._subject_names(odd) == ["1", "2", "3"]
    assert maps._subject_names(odd.assign_coords(subject=["../../etc", "x y", "b"])) == ["etc", "xy", "b"]

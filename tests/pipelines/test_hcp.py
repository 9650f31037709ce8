"""The synthetic cortical study: its cohort follows the model, its parcels are contiguous, its pictures match networks."""

import numpy as np
import pytest
import xarray as xr
import zarr
from matplotlib.figure import Figure
from scipy.spatial import cKDTree
from scipy.special import softmax

from pipelines.hcp import figures, make_cohort
from pipelines.hcp.simulate import BETWEEN_SUBJECTS, NOISE, TAU, smooth_fields, sphere


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("hcp") / "c.zarr")
    make_cohort(path, subjects=3, vertices=4000, features=8, seed=3)
    return path


def test_sphere_is_even():
    points = sphere(3000)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1.0, rtol=1e-6)
    nearest = cKDTree(points).query(points, 2)[0][:, 1]
    assert nearest.max() / nearest.min() < 2.5
    np.testing.assert_allclose(points.mean(0), 0.0, atol=1e-3)


def test_parcels_are_contiguous():
    points = sphere(5000)
    label = smooth_fields(points, 7, np.random.default_rng(0)).argmax(1)
    neighbours = cKDTree(points).query(points, 5)[1][:, 1:]
    assert (label[neighbours] == label[:, None]).mean() > 0.85
    assert len(np.unique(label)) == 7


def test_data_follow_the_model(store):
    x = xr.open_zarr(store, consolidated=False)["x"].values
    truth = xr.open_zarr(store, group="truth", consolidated=False).load()
    square = (x[:, :, :, None, :] - truth["mu_session"].values[:, :, None]) ** 2
    label = square.sum(-1).argmin(-1)
    # The networks are far apart, so that the nearest mean is nearly always the label's.
    residual = np.take_along_axis(square, label[..., None, None], 3)
    assert np.sqrt(residual.mean()) == pytest.approx(NOISE, rel=0.05)
    expected = softmax(truth["label_logits"].values, -1)
    share = (label[..., None] == np.arange(7)).mean((1, 2))
    np.testing.assert_allclose(share, expected.mean(1), atol=0.04)
    assert (truth["label_logits"] - truth["rho"]).std().item() == pytest.approx(TAU, rel=0.02)
    assert (truth["mu_subject"] - truth["mu"]).std().item() == pytest.approx(BETWEEN_SUBJECTS, rel=0.2)
    assert truth["rho"].std("vertex").values == pytest.approx(2.0, rel=0.01)


def test_a_subject_does_not_depend_on_the_others(store, tmp_path):
    make_cohort(str(tmp_path / "one.zarr"), subjects=1, vertices=4000, features=8, seed=3)
    one, three = (xr.open_zarr(p, consolidated=False)["x"].isel(subject=0).values for p in (tmp_path / "one.zarr", store))
    np.testing.assert_array_equal(one, three)


def test_chunks_are_checksummed(store):
    array = zarr.open_group(store, mode="r")["x"]
    assert array.chunks == (3, 2, 1024, 8)
    assert np.isnan(array.fill_value)
    assert [type(c).__name__ for c in array.compressors] == ["Crc32cCodec"]


def test_networks_are_matched():
    rng = np.random.default_rng(0)
    true = rng.standard_normal((7, 12))
    order = rng.permutation(7)
    recovered = true[order] + 0.1 * rng.standard_normal(true.shape)
    found = figures.match(recovered, true)
    np.testing.assert_allclose(recovered[found], true, atol=0.6)
    # as the demo renumbers the truth
    np.testing.assert_array_equal(true[np.argsort(found)], true[order])


def test_pictures_draw(store):
    truth = xr.open_zarr(store, group="truth", consolidated=False)
    label = truth["rho"].values.argmax(1)
    figures.maps({"true": label, "again": label}).savefig("/dev/null", format="png")
    figure = Figure()
    figures.fingerprints(figure.subplots(), truth["mu"].values, truth["mu"].values)
    figure.savefig("/dev/null", format="png")


def test_collage_joins_pictures(tmp_path):
    for name in ("a", "b", "c"):
        Figure(figsize=(2, 1)).savefig(tmp_path / f"{name}.png")
    figures.collage(tmp_path, ["a", "b", "c"], tmp_path / "all.png")
    assert (tmp_path / "all.png").stat().st_size > 500

"""The synthetic cortical study: its cohort follows the model, its parcels are contiguous, its pictures match networks."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import xarray as xr
import zarr
from matplotlib.figure import Figure
from scipy.spatial import cKDTree
from scipy.special import softmax

from pavi_scale.errors import InputError, PlanRefused, RunError
from pipelines.hcp import command, figures, make_cohort, storing
from pipelines.hcp.simulate import BETWEEN_SUBJECTS, NOISE, TAU, smooth_fields, sphere, subjects_of


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
    assert (label[neighbours] == label[:, None]).mean() > 0.9
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


def contents(store):
    """Bytes of every file, by its path in the store."""
    return {p.relative_to(store).as_posix(): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


SHAPE = {"subjects": 50, "vertices": 300, "features": 4, "seed": 5}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "c.zarr"
    make_cohort(str(path), **SHAPE, threads=1)
    return contents(path)


def test_numbers_do_not_depend_on_threads(whole, tmp_path):
    make_cohort(str(tmp_path / "c.zarr"), **SHAPE, threads=3)
    assert contents(tmp_path / "c.zarr") == whole


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_an_interrupted_simulation_goes_on(whole, tmp_path, blocks):
    path, partial, steps = tmp_path / "c.zarr", tmp_path / "c.zarr.partial", []

    def stop(done, of):
        if done > storing.BLOCK.subjects * blocks:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_cohort(str(path), **SHAPE, threads=1, tell=stop)
    assert not path.exists()
    next(partial.glob("truth/label_logits/c/0/1/0")).unlink()  # killed between two files of a block
    with pytest.raises(RunError, match=r"other settings.*'seed': 5.*'seed': 6.*delete"):
        make_cohort(str(path), **SHAPE | {"seed": 6})
    make_cohort(str(path), **SHAPE, tell=lambda *step: steps.append(step))
    assert contents(path) == whole
    assert not partial.exists()
    # What was whole is not drawn again.
    assert len(steps) == 3 - blocks
    assert steps[-1] == (SHAPE["subjects"], SHAPE["subjects"])


def test_a_killed_simulation_goes_on(whole, tmp_path):
    arguments = ", ".join(f"{k}={v}" for k, v in SHAPE.items())
    slow = "lambda *step: (print('block', flush=True), time.sleep(60))"
    code = f"import time; from pipelines.hcp import make_cohort; make_cohort('c.zarr', {arguments}, tell={slow})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, env=environment) as process:
        process.stdout.readline()
        time.sleep(0.03)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "c.zarr").exists()
    make_cohort(str(tmp_path / "c.zarr"), **SHAPE)
    assert contents(tmp_path / "c.zarr") == whole


def test_a_cohort_in_the_way_is_left_alone(store, tmp_path):
    with pytest.raises(RunError, match="already"):
        make_cohort(store, 1, 50)
    zarr.create_group(tmp_path / "c.zarr.partial")
    with pytest.raises(RunError, match="something else"):
        make_cohort(str(tmp_path / "c.zarr"), 1, 50)


def test_room_on_the_disk_is_checked_first(tmp_path, monkeypatch):
    """At full size 15.2 GB of data, 1.7 GB of label logits, the ends of the last chunks, and what a file system needs of its own."""
    monkeypatch.setattr(storing.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2e10, 3.2e9, 16.8e9))
    with pytest.raises(PlanRefused, match=r"expected: 16\.9\d GB free; got: 16\.80 GB free") as error:
        make_cohort(str(tmp_path / "deep" / "c.zarr"), subjects_of("100%"))
    assert error.value.exit_code == 3
    assert not list(tmp_path.iterdir())


def test_sizes_are_shares_of_the_study():
    assert [subjects_of(s) for s in ("1%", "10%", "100%", "0.01%")] == [10, 100, 1000, 1]
    for bad in ("10", "0%", "101%", "x%", "nan%"):
        with pytest.raises(InputError, match="not a size"):
            subjects_of(bad)


def test_one_percent_from_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "simulate", "--size", "1%", "--vertices", "700", "--cohort", str(tmp_path / "new" / "c.zarr")])
    command.main()
    assert xr.open_zarr(tmp_path / "new" / "c.zarr", consolidated=False)["x"].shape == (10, 2, 700, 32)
    assert "simulated: 10 of 10 subjects, 100 %" in capsys.readouterr().err


def test_chunks_are_checksummed(store):
    array = zarr.open_group(store, mode="r")["x"]
    assert array.chunks == (3, 2, 128, 8)
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


def test_pictures_show_what_they_are_given(store):
    """Every vertex once, in the colour of its label, on the side it is seen from; every feature of every network at (true, recovered)."""
    truth = xr.open_zarr(store, group="truth", consolidated=False)
    label = truth["rho"].values.argmax(1)
    figure = figures.maps({"true": label, "again": (label + 1) % 7})
    assert [axes.get_title() for axes in figure.axes] == ["true", "again"]
    points = sphere(len(label))
    for axes, shown in zip(figure.axes, (label, (label + 1) % 7), strict=True):
        for drawn, side in zip(axes.collections, (1, -1), strict=True):
            seen = side * points[:, 1] < 0
            np.testing.assert_allclose(drawn.get_facecolors(), figures.COLOURS(shown[seen]))
            np.testing.assert_allclose(drawn.get_offsets()[:, 1], points[seen, 2], rtol=1e-6)
    true = truth["mu"].values
    recovered = true + 0.3
    axes = Figure().subplots()
    figures.fingerprints(axes, recovered, true)
    assert [c.get_label() for c in axes.collections] == [f"network {n}" for n in range(1, 8)]
    np.testing.assert_allclose(np.concatenate([c.get_offsets() for c in axes.collections]), np.stack([true.ravel(), recovered.ravel()], 1))
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), axes.lines[0].get_ydata())
    assert axes.get_title() == "fingerprints, r = 1.0000"
    for drawn in (figure, axes.figure):
        drawn.savefig("/dev/null", format="png")


def test_collage_joins_pictures(tmp_path):
    for name in ("a", "b", "c"):
        Figure(figsize=(2, 1)).savefig(tmp_path / f"{name}.png")
    figures.collage(tmp_path, ["a", "b", "c"], tmp_path / "all.png")
    assert (tmp_path / "all.png").stat().st_size > 500

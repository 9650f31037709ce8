"""Laws of the stored posterior: readable anywhere, whole or absent, never silently wrong."""

from __future__ import annotations

import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

from pavi_scale.errors import NumericalError, PaviError, RunError
from pavi_scale.posterior import store
from pavi_scale.posterior.integrity import verify
from pavi_scale.posterior.sampler import storage_dtype
from pavi_scale.posterior.store import PosteriorWriter
from tests.posterior import toy


def test_plain_xarray_reads_it_without_the_package(finished: Path, tmp_path: Path) -> None:
    script = """
import sys, warnings
warnings.simplefilter("error")
sys.modules["pavi_scale"] = None  # importing it raises ImportError
import numpy as np, xarray as xr
run = sys.argv[1]
mean = xr.open_zarr(run + "/posterior.zarr", group="posterior_mean")
sd = xr.open_zarr(run + "/posterior.zarr", group="posterior_sd").load()
assert mean["logits"].dims == ("subject", "vertex", "network"), mean
assert mean["mu"].dims == () and mean["mu"].dtype == "float64"
assert list(map(str, mean["subject"].values)) == ["anna", "bert", "cleo", "d\\u00f6rte"], mean["subject"]
np.save(sys.argv[2], mean["logits"].sel(subject="cleo").values)
assert sd["theta"].notnull().all()
print(xr.open_zarr(run + "/posterior.zarr", group="diagnostics")["khat"].sel(subject="bert").values)
"""
    done = subprocess.run([sys.executable, "-c", script, str(finished), str(tmp_path / "out.npy")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), toy.mean("logits")[2])
    np.testing.assert_allclose(float(done.stdout), 0.5 / 3)


def test_layout_on_disk(finished: Path) -> None:
    array = zarr.open_array(finished / "posterior.zarr", path="posterior_mean/logits", mode="r")
    assert array.chunks == (1, 2, 3)
    assert array.shards == (1, 4, 3)
    groups = zarr.open_group(finished / "posterior.zarr", mode="r")
    for _, member in groups.members(max_depth=None):
        if isinstance(member, zarr.Array):
            assert "crc32c" in str(member.metadata.to_dict()["codecs"])


def test_dtype_follows_size() -> None:
    assert storage_dtype(1_000_000) == np.float64
    assert storage_dtype(1_000_001) == np.float32


def _work(writer: PosteriorWriter, name: str) -> None:
    toy.fill(writer, (name,))


def test_worker_processes_write_their_regions(tmp_path: Path) -> None:
    writer = PosteriorWriter.create(tmp_path, toy.context(), chunks={"subject": 2})
    assert pickle.loads(pickle.dumps(writer)).path == writer.path
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        list(pool.map(_work, [PosteriorWriter.open(tmp_path)] * len(toy.shapes()), toy.shapes()))
    assert writer.missing() == []
    assert not writer.is_complete
    path = writer.finish()
    assert writer.is_complete
    for name in toy.shapes():
        np.testing.assert_array_equal(xr.open_zarr(path, group="posterior_mean")[name].values, toy.mean(name))
        np.testing.assert_array_equal(xr.open_zarr(path, group="posterior_sd")[name].values, toy.sd(name))


def test_an_incomplete_posterior_is_not_finished(tmp_path: Path) -> None:
    writer = PosteriorWriter.create(tmp_path, toy.context(), chunks={"subject": 1})
    toy.fill(writer, ("mu", "kappa", "theta"))
    writer.write("logits", {"subject": slice(1, 2)}, toy.mean("logits")[1:2], toy.sd("logits")[1:2])
    with pytest.raises(RunError, match=r"incomplete.*6 missing"):
        writer.finish()
    assert not (tmp_path / "posterior.zarr").exists()
    # A later process goes on where this one stopped.
    again = PosteriorWriter.create(tmp_path, toy.context(), chunks={"subject": 1}, keep=True)
    assert sorted(again.missing()) == sorted(f"{g}/logits/c/{s}/0/0" for g in store.MOMENTS for s in (0, 2, 3))
    toy.fill(again, ("logits",))
    again.finish()
    # With other chunks it starts afresh.
    assert len(PosteriorWriter.create(tmp_path, toy.context(), chunks={"subject": 2}, keep=True).missing()) == 2 * (1 + 1 + 2 + 2)


@pytest.mark.parametrize(
    ("region", "mean", "error"),
    [
        ({"subject": slice(0, 1)}, np.ones((1, 10, 3)), RunError),  # cuts a chunk of two
        ({"subject": slice(0, 4, 2)}, np.ones((2, 10, 3)), RunError),
        ({"subject": range(2, 6)}, np.ones((4, 10, 3)), RunError),
        ({"visit": slice(0, 2)}, np.ones((4, 10, 3)), RunError),
        ({"subject": slice(0, 2)}, np.ones((2, 10)), RunError),
        ({"subject": slice(0, 2)}, np.full((2, 10, 3), np.nan), NumericalError),
        ({"subject": slice(0, 2)}, np.full((2, 10, 3), np.inf), NumericalError),
    ],
)
def test_bad_writes_are_refused(tmp_path: Path, region: dict[str, slice], mean: np.ndarray, error: type[PaviError]) -> None:
    writer = PosteriorWriter.create(tmp_path, toy.context(), chunks={"subject": 2})
    with pytest.raises(error):
        writer.write("logits", region, mean, np.ones_like(mean))
    assert len(writer.missing()) == 2 * (1 + 1 + 2 + 2)


def test_bad_values_are_named(tmp_path: Path) -> None:
    writer = PosteriorWriter.create(tmp_path, toy.context(), chunks={"subject": 2})
    values = toy.mean("logits")[2:4].copy()
    values[1, 7, 2] = np.nan
    with pytest.raises(NumericalError, match=r"\[3, 7, 2\]"):
        writer.write("logits", {"subject": range(2, 4)}, values, values)
    with pytest.raises(NumericalError, match="posterior_sd"):
        writer.write("theta", {}, toy.mean("theta"), -toy.sd("theta"))
    with pytest.raises(NumericalError, match="posterior_mean"):
        writer.write("mu", {}, np.array(np.inf), np.array(1.0))
    with pytest.raises(NumericalError, match="'fit'"):
        writer.put("fit", xr.Dataset({"elbo": ("step", [-np.inf, 1.0])}))
    with pytest.raises(RunError, match="no posterior to write"):
        PosteriorWriter.open(tmp_path / "nowhere")
    with pytest.raises(RunError, match="whole chunks"):
        PosteriorWriter.create(tmp_path, toy.context(), chunks={"vertex": 2}, shards={"vertex": 3})


def test_every_flipped_bit_is_found(finished: Path) -> None:
    path = finished / "posterior.zarr"
    assert verify(path) > 10
    rng = np.random.default_rng(0)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        whole = file.read_bytes()
        for position in rng.choice(len(whole), size=min(4, len(whole)), replace=False):
            broken = bytearray(whole)
            broken[position] ^= 1 << int(rng.integers(8))
            file.write_bytes(bytes(broken))
            with pytest.raises(RunError):
                verify(path)
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(RunError):
            verify(path, content=False)
        file.unlink()
        with pytest.raises(RunError):
            verify(path, content=False)
        file.write_bytes(whole)
    verify(path)
    (path / "posterior_mean" / "theta" / "c" / "9").write_bytes(b"x")
    with pytest.raises(RunError, match="not in the manifest"):
        verify(path)


def test_a_flipped_bit_in_a_chunk_fails_the_plain_read(finished: Path) -> None:
    rng = np.random.default_rng(1)
    for name in ("logits", "theta", "mu"):
        for file in (finished / "posterior.zarr" / "posterior_mean" / name).rglob("c*"):
            if not file.is_file():
                continue
            whole = bytearray(file.read_bytes())
            for position in rng.choice(len(whole), size=6):
                broken = bytearray(whole)
                broken[position] ^= 1 << int(rng.integers(8))
                file.write_bytes(bytes(broken))
                with pytest.raises((ValueError, RuntimeError), match=r"(?i)crc32c|checksum"):
                    xr.open_zarr(finished / "posterior.zarr", group="posterior_mean", chunks=None)[name].load()
            file.write_bytes(bytes(whole))


def test_a_rename_cut_in_two_is_completed(finished: Path) -> None:
    writer = PosteriorWriter.create(finished, toy.context())
    toy.fill(writer)
    writer.finish()
    (finished / "posterior.zarr").rename(finished / "posterior.zarr.partial")  # as after a crash between the two renames
    assert store.settle(finished).is_dir()
    verify(finished / "posterior.zarr")
    assert not list(finished.glob("posterior.zarr.*"))


def test_a_symbolic_link_is_refused(finished: Path, tmp_path: Path) -> None:
    chunk = finished / "posterior.zarr" / "posterior_mean" / "theta" / "c" / "0"
    chunk.rename(tmp_path / "elsewhere")
    chunk.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="leaves the store"):
        verify(finished / "posterior.zarr", content=False)


def test_small_groups_keep_text_zeros_and_the_unknown(tmp_path: Path) -> None:
    writer = PosteriorWriter.create(tmp_path, toy.context())
    toy.fill(writer)
    fit = xr.Dataset(
        {"elbo": ("step", [np.nan, np.nan, 3.0]), "stage": ("step", ["prior", "", "ö"]), "skipped": ("step", np.zeros(3, dtype=int))},
        coords={"step": np.zeros(3, dtype=int), "unit": ("step", ["a", "b", "c"])},
        attrs={"status": "ok"},
    )
    writer.put("fit", fit.isel(step=slice(1)))
    writer.put("fit", fit)  # replaces the earlier one
    with pytest.raises(RunError, match="region by region"):
        writer.put("posterior_sd", fit)
    back = xr.open_zarr(writer.finish(), group="fit").load()
    xr.testing.assert_equal(back, fit)
    assert back.attrs == fit.attrs

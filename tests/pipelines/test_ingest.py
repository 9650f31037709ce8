"""Surface files written by nibabel itself become a cohort, and what does not fit is refused before anything is written."""

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import xarray as xr
import zarr
from nibabel.cifti2 import BrainModelAxis, Cifti2Image, ScalarAxis, SeriesAxis

import pavi_scale as ps
from pavi_scale.errors import CohortError, PaviError, PlanRefused, RunError
from pipelines.hcp import bids, maps, model, storing
from pipelines.hcp.ingest import ingest
from pipelines.hcp.surfaces import form_of, values_of

MESH = 40
LEFT, RIGHT = np.flatnonzero(np.arange(MESH) % 7 != 0), np.flatnonzero(np.arange(MESH) % 5 != 0)
MAPS = ["faces", "places", "tools"]
VERTICES = len(LEFT) + len(RIGHT)
CORTEX = "CIFTI_STRUCTURE_CORTEX_"


def brain(left=LEFT, right=RIGHT, mesh=MESH):
    """Both cortices without their medial walls, and a block of the thalamus between them."""
    mask = np.zeros((3, 3, 3), bool)
    mask[0, 0] = True
    volume = BrainModelAxis.from_mask(mask, "CIFTI_STRUCTURE_THALAMUS_LEFT", np.eye(4))
    return BrainModelAxis.from_surface(left, mesh, "CortexLeft") + volume + BrainModelAxis.from_surface(right, mesh, "CortexRight")


def write_cifti(path, values, rows=None, axis=None, dtype=np.float32):
    """Values (map, cortical vertex) as a file; subcortical values are 1e6."""
    axis = axis or brain()
    whole = np.full((len(values), len(axis)), 1e6, dtype)
    whole[:, np.flatnonzero(axis.surface_mask)] = values
    Cifti2Image(whole, header=(rows or ScalarAxis(MAPS[: len(values)]), axis)).to_filename(path)
    return path


def write_gifti(path, values, structure=None, names=MAPS):
    """Values (map, vertex of the whole mesh) as a file."""
    meta = {"AnatomicalStructurePrimary": structure} if structure else {}
    arrays = [nib.gifti.GiftiDataArray(v.astype(np.float32), meta={"Name": n}, datatype="NIFTI_TYPE_FLOAT32") for v, n in zip(values, names, strict=True)]
    nib.GiftiImage(darrays=arrays, meta=nib.gifti.GiftiMetaData(meta)).to_filename(path)
    return path


@pytest.fixture
def data():
    """Values by (subject, session), (map, vertex)."""
    rng = np.random.default_rng(0)
    return {(s, t): rng.standard_normal((3, VERTICES)).astype(np.float32) for s in ("10", "9", "2") for t in ("run-2", "run-10")}


@pytest.fixture
def files(tmp_path, data):
    return [write_cifti(tmp_path / f"sub-{s}_task-film_{t}_space-fsLR_stat.dscalar.nii", v) for (s, t), v in data.items()]


def opened(path):
    return xr.open_zarr(path, consolidated=False)


def test_cifti_becomes_a_cohort_of_the_study(tmp_path, files, data):
    done = ingest(files, tmp_path / "c.zarr")
    assert done.sizes == {"subject": 3, "session": 2, "vertex": VERTICES, "feature": 3}
    found = opened(tmp_path / "c.zarr")
    assert found["x"].dims == ("subject", "session", "vertex", "feature")
    assert list(found["subject"].values) == ["2", "9", "10"]
    assert list(found["session"].values) == ["task-film_run-2", "task-film_run-10"]
    assert list(found["run"].values) == ["2", "10"]
    assert list(found["task"].values) == ["film", "film"]
    assert list(found["feature"].values) == MAPS
    for (s, t), values in data.items():
        np.testing.assert_array_equal(found["x"].sel(subject=s, session=f"task-film_{t}").values, values.T)
    np.testing.assert_array_equal(found["surface_vertex"], np.concatenate([LEFT, RIGHT]))
    assert list(found["structure"].values) == [CORTEX + "LEFT"] * len(LEFT) + [CORTEX + "RIGHT"] * len(RIGHT)
    assert found["structure"].attrs["mesh_vertices"] == {CORTEX + "LEFT": MESH, CORTEX + "RIGHT": MESH}
    cohort = ps.open_cohort(tmp_path / "c.zarr", model)
    cohort.check_values()
    assert cohort.layout.cardinality == {"subject": 3, "session": 2, "vertex": VERTICES}
    assert list(cohort.coordinate("subject")) == ["2", "9", "10"]
    assert cohort.dataset["structure"].attrs == found["structure"].attrs  # a posterior finds its way back to the surface
    assert list(cohort.dataset["run"].values) == ["2", "10"]
    array = zarr.open_group(tmp_path / "c.zarr", mode="r")["x"]
    assert [type(c).__name__ for c in array.compressors] == ["Crc32cCodec"]


def test_the_32k_mesh_keeps_59412_vertices(tmp_path):
    left, right = np.arange(29_696), np.arange(29_716)
    values = np.random.default_rng(0).standard_normal((1, 59_412))
    path = write_cifti(tmp_path / "sub-1_x.dscalar.nii", values, axis=brain(left, right, 32_492))
    assert ingest([path], tmp_path / "c.zarr").sizes == {"subject": 1, "session": 1, "vertex": 59_412, "feature": 1}


@pytest.mark.parametrize("dtype", [np.float64, np.int16])
def test_numbers_of_any_type_are_read(tmp_path, dtype):
    values = np.arange(2 * VERTICES).reshape(2, -1).astype(dtype)
    path = write_cifti(tmp_path / "sub-1_x.dscalar.nii", values, dtype=dtype)
    ingest([path], tmp_path / "c.zarr")
    np.testing.assert_array_equal(opened(tmp_path / "c.zarr")["x"].values[0, 0], values.T.astype(np.float32))


def test_series_keep_their_times(tmp_path):
    rng = np.random.default_rng(1)
    rows = SeriesAxis(start=0.0, step=0.72, size=20)
    paths = [write_cifti(tmp_path / f"sub-{s}_task-film_bold.dtseries.nii", rng.standard_normal((20, VERTICES)), rows) for s in (1, 2)]
    ingest(paths, tmp_path / "c.zarr")
    found = opened(tmp_path / "c.zarr")
    np.testing.assert_allclose(found["feature"], 0.72 * np.arange(20))
    assert found["feature"].attrs["units"] == "second"
    slower = write_cifti(tmp_path / "sub-3_task-film_bold.dtseries.nii", rng.standard_normal((20, VERTICES)), SeriesAxis(start=0.0, step=1.0, size=20))
    with pytest.raises(CohortError, match="different time points"):
        ingest([*paths, slower], tmp_path / "d.zarr")


def test_gifti_hemispheres_are_joined_without_the_medial_wall(tmp_path):
    rng = np.random.default_rng(2)
    wall = {"L": np.arange(0, 5), "R": np.arange(30, 40)}
    paths, expected = [], {}
    for s in ("01", "02"):
        for t in ("1", "2"):
            halves = []
            for h, name in (("R", "CortexRight"), ("L", "CortexLeft")):
                values = rng.standard_normal((3, MESH))
                values[:, wall[h]] = np.nan if t == "1" else 0.0
                values[:, 12] = 0.0 if (s, t) == ("01", "2") else values[:, 12]  # zero in one recording: no medial wall
                paths.append(write_gifti(tmp_path / f"sub-{s}_ses-{t}_hemi-{h}_bold.func.gii", values, name))
                halves.insert(0, np.delete(values, wall[h], 1))
            expected[s, f"ses-{t}"] = np.concatenate(halves, 1).astype(np.float32).T
    done = ingest(paths, tmp_path / "c.zarr")
    assert done.dropped == 15
    found = opened(tmp_path / "c.zarr")
    for (s, t), values in expected.items():
        np.testing.assert_array_equal(found["x"].sel(subject=s, session=t).values, values)
    np.testing.assert_array_equal(found["surface_vertex"], [*range(5, 40), *range(30)])
    assert list(found["feature"].values) == MAPS


@pytest.mark.parametrize(("scaling", "axis"), [("maps", "vertex"), ("vertices", "feature")])
def test_scaling_gives_mean_zero_and_sd_one(tmp_path, files, scaling, axis):
    ingest(files, tmp_path / "c.zarr", zscore=scaling)
    ingest(files, tmp_path / "raw.zarr")
    x, raw = opened(tmp_path / "c.zarr")["x"], opened(tmp_path / "raw.zarr")["x"]
    np.testing.assert_allclose(x.mean(axis), 0.0, atol=1e-5)
    np.testing.assert_allclose(x.std(axis), 1.0, rtol=1e-5)
    np.testing.assert_allclose((raw - raw.mean(axis)) / raw.std(axis), x, atol=1e-4)


def test_a_killed_ingestion_goes_on(tmp_path, files, monkeypatch):
    """What an interruption leaves is not taken for a cohort; the next call writes what is missing, and no more."""
    monkeypatch.setattr("pipelines.hcp.ingest._BLOCK_BYTES", 1)  # one subject at a time
    ingest(files, tmp_path / "whole.zarr")

    def interrupt(what, done, of):
        if what == "writing" and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(files, tmp_path / "c.zarr", tell=interrupt)
    assert not (tmp_path / "c.zarr").exists()
    assert (tmp_path / "c.zarr.partial").exists()
    with pytest.raises(RunError, match="other settings"):
        ingest(files, tmp_path / "c.zarr", zscore="maps")
    steps = []
    ingest(files, tmp_path / "c.zarr", tell=lambda what, done, of: steps.append((what, done)))
    assert [done for what, done in steps if what == "writing"] == [6]
    xr.testing.assert_identical(opened(tmp_path / "c.zarr").load(), opened(tmp_path / "whole.zarr").load())


def bad_value(tmp_path, data):
    values = data["9", "run-2"].copy()
    values[1, 7] = np.nan
    return [write_cifti(tmp_path / "sub-9_task-film_run-2_space-fsLR_stat.dscalar.nii", values)]


def cut(tmp_path, data):
    path = tmp_path / "sub-9_task-film_run-2_space-fsLR_stat.dscalar.nii"
    path.write_bytes(path.read_bytes()[:-100])
    return []


BAD = {
    "no subject": (lambda t, d: [write_cifti(t / "ses-1_x.dscalar.nii", d["9", "run-2"])], "whose data", "BIDS name"),
    "no bids": (lambda t, d: [write_cifti(t / "100307.rfMRI_REST1.dscalar.nii", d["9", "run-2"])], "whose data", "100307"),
    "no surface": (lambda t, d: [t / "sub-1_bold.nii.gz"], "not a surface file", "dscalar"),
    "two kinds": (lambda t, d: [t / "sub-1_hemi-L_bold.func.gii"], "several kinds", "func.gii"),
    "twice": (lambda t, d: [write_cifti(t / "sub-9_task-film_run-2_space-fsLR_den-32k_stat.dscalar.nii", d["9", "run-2"])], "two files", "den-32k"),
    "session missing": (lambda t, d: [write_cifti(t / "sub-11_task-film_run-2_stat.dscalar.nii", d["9", "run-2"])], "lacks a session", "'11'"),
    "absent": (lambda t, d: [t / "sub-9_task-film_run-3_stat.dscalar.nii"], "lacks a session", "run-3"),
    "cut short": (cut, "cut short", "sub-9_task-film_run-2"),
    "not finite": (bad_value, "not finite", "vertex 9 of CIFTI_STRUCTURE_CORTEX_LEFT, feature places"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, files, data, name):
    make, what, where = BAD[name]
    extra = make(tmp_path, data)
    with pytest.raises(CohortError) as error:
        ingest(list(dict.fromkeys([*files, *extra])), tmp_path / "c.zarr")
    assert what in str(error.value)
    assert where in str(error.value)
    assert not list(tmp_path.glob("c.zarr*"))


def test_files_that_do_not_belong_together_are_refused(tmp_path, data):
    one = write_cifti(tmp_path / "sub-1_x.dscalar.nii", data["9", "run-2"])
    others = {
        "different vertices": write_cifti(tmp_path / "sub-2_x.dscalar.nii", np.ones((3, VERTICES - 1)), axis=brain(left=LEFT[1:])),
        "meshes": write_cifti(tmp_path / "sub-3_x.dscalar.nii", data["9", "run-2"], axis=brain(mesh=50)),
        "different maps": write_cifti(tmp_path / "sub-4_x.dscalar.nii", data["9", "run-2"], ScalarAxis(["faces", "places", "houses"])),
        "expected: 3: faces": write_cifti(tmp_path / "sub-5_x.dscalar.nii", data["9", "run-2"][:2]),
        "cannot be read": tmp_path / "sub-6_x.dscalar.nii",
        "no cortical surface": tmp_path / "sub-7_x.dscalar.nii",
        "is no CIFTI-2 file": tmp_path / "sub-8_x.dscalar.nii",
    }
    thalamus = brain()[len(LEFT) : len(LEFT) + 3]
    Cifti2Image(np.ones((3, 3), np.float32), header=(ScalarAxis(MAPS), thalamus)).to_filename(others["no cortical surface"])
    nib.save(nib.Nifti2Image(np.ones((2, 2, 2), np.float32), np.eye(4)), str(tmp_path / "plain.nii"))
    shutil.move(tmp_path / "plain.nii", others["is no CIFTI-2 file"])
    for message, path in others.items():
        with pytest.raises(CohortError, match=message):
            ingest([one, path], tmp_path / "c.zarr")
    left = write_gifti(tmp_path / "sub-1_hemi-L_x.func.gii", np.ones((3, MESH)), "CortexRight")
    right = write_gifti(tmp_path / "sub-1_hemi-R_x.func.gii", np.ones((3, MESH)), "CortexRight")
    with pytest.raises(CohortError, match="another hemisphere"):
        ingest([left, right], tmp_path / "c.zarr")
    with pytest.raises(CohortError, match="hemi-L or hemi-R"):
        ingest([write_gifti(tmp_path / "sub-1_x.func.gii", np.ones((3, MESH)))], tmp_path / "c.zarr")
    with pytest.raises(CohortError, match="a map is constant"):
        ingest([write_cifti(tmp_path / "sub-9_x.dscalar.nii", np.ones((3, VERTICES)))], tmp_path / "c.zarr", zscore="maps")
    with pytest.raises(CohortError, match="a vertex is constant"):
        ingest([write_cifti(tmp_path / "sub-9_x.dscalar.nii", np.ones((3, VERTICES)))], tmp_path / "c.zarr", zscore="vertices")
    assert not list(tmp_path.glob("c.zarr*"))


def test_room_on_the_disk_is_checked_first(tmp_path, files, monkeypatch):
    monkeypatch.setattr(storing.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1000))
    with pytest.raises(PlanRefused, match=r"0\.00 GB free"):
        ingest(files, tmp_path / "c.zarr")
    assert not list(tmp_path.glob("c.zarr*"))


def test_damaged_files_give_typed_errors(tmp_path, files):
    """Bits flipped and ends cut at random: read, or refused in our words."""
    rng = np.random.default_rng(0)
    gifti = write_gifti(tmp_path / "sub-1_hemi-L_x.func.gii", rng.standard_normal((3, MESH)), "CortexLeft")
    refused = 0
    for n in range(120):
        path = files[0] if n % 2 else gifti
        whole = bytearray(path.read_bytes())
        copy = tmp_path / f"n{n}" / path.name
        copy.parent.mkdir()
        for _ in range(3):
            whole[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        copy.write_bytes(whole[: rng.integers(1, len(whole))] if n % 3 == 0 else whole)
        try:
            ingest([copy], tmp_path / f"n{n}" / "c.zarr")
        except PaviError:
            refused += 1
            assert not list(copy.parent.glob("c.zarr*"))
    assert refused > 40


def test_sessions_differ_by_their_entities():
    names = ["sub-1_ses-a_task-rest_desc-x_bold.func.gii", "sub-1_ses-b_bold.func.gii"]
    paths = [Path(n.replace("_bold", f"_hemi-{h}_bold")) for n in names for h in "RL"]
    found = bids.find(paths)
    assert found.sessions == ("ses-a_task-rest", "ses-b")
    assert found.entities == {"ses": ("a", "b"), "task": ("rest", "")}
    assert found.hemispheres == ("L", "R")
    assert [p.name for p in found.files["1", "ses-b"]] == ["sub-1_ses-b_hemi-L_bold.func.gii", "sub-1_ses-b_hemi-R_bold.func.gii"]


@pytest.mark.slow
def test_from_files_to_maps(tmp_path, files):
    """Ingested, fitted, and written as maps of the very vertices that the files have."""
    ingest(files, tmp_path / "c.zarr", zscore="maps")
    posterior = ps.fit(model, tmp_path / "c.zarr", run=tmp_path / "run", progress=False, max_time=1.0)
    written = maps.write_maps(posterior, tmp_path / "maps", subjects=["10"])
    assert [p.name for p in written[2:]] == ["sub-10_dseg.dlabel.nii", "sub-10_probseg.dscalar.nii"]
    for path in written[1::2]:
        assert form_of([path]).surface.differs(form_of(files[:1]).surface) is None
        probability = values_of([path])[:, 2:]
        np.testing.assert_allclose(probability.sum(1), 1.0, rtol=1e-5)

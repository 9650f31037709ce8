"""Flipped bits, cut and lost files of cohorts, checkpoints and posteriors: none goes unseen."""

import shutil

import numpy as np
import pytest
import xarray as xr

import pavi_scale as ps
from pavi_scale.checking import check_cohort, check_path, check_run
from pavi_scale.cohort import open_cohort
from pavi_scale.durable import seal, unseal
from pavi_scale.errors import CohortError, InputError, RunError
from pavi_scale.run import Run
from tests.faults import study


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished fit that kept two checkpoints, with a copy of its cohort."""
    path = tmp_path_factory.mktemp("damage") / "run"
    study.begin(path, "rows")
    return path


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """A simulated cohort in several chunks, with labels."""
    path = tmp_path_factory.mktemp("damage") / "cohort.zarr"
    labels = xr.Dataset(coords={"g": [f"unit {i}" for i in range(6)]})
    ps.simulate(study.plain, {"g": 6, "i": 3}, path, given=labels, seed=1, chunks={"g": 2})
    return path


def damage(file, rng):
    """Spoil a file in a random way; returns what was done."""
    whole = bytearray(file.read_bytes())
    kind = rng.choice(["flip", "cut", "lose"], p=[0.7, 0.25, 0.05])
    if kind == "flip":
        at, bit = int(rng.integers(len(whole))), int(rng.integers(8))
        whole[at] ^= 1 << bit
        file.write_bytes(bytes(whole))
        return f"bit {bit} of byte {at}"
    if kind == "cut":
        length = int(rng.integers(len(whole)))
        file.write_bytes(bytes(whole[:length]))
        return f"cut to {length} bytes"
    file.unlink()
    return "lost"


def harmless(name, whole, file):
    """A log is one of lines: losing the last ones, or all, leaves an earlier log."""
    return name == "events.jsonl" and (not file.exists() or (whole.startswith(file.read_bytes()) and whole[: file.stat().st_size][-1:] in (b"\n", b"")))


def silent(place, check, rng, count):
    """Damage one file at a time, `count` times; returns what went unseen."""
    files = sorted(p for p in place.rglob("*") if p.is_file() and p.stat().st_size)
    size = np.array([p.stat().st_size for p in files], dtype=float)
    # Half of the time a file at random, half of the time a byte at random: neither small files nor large ones are spared.
    share = 0.5 / len(files) + 0.5 * size / size.sum()
    unseen = []
    for _ in range(count):
        file = files[rng.choice(len(files), p=share)]
        name, whole = file.relative_to(place).as_posix(), file.read_bytes()
        what = damage(file, rng)
        try:
            rows = check(place)
        except InputError:
            pass
        else:
            if not any("damaged" in text for _, text in rows) and not harmless(name, whole, file) and not name.startswith("leases/"):
                unseen.append(f"{name}: {what}")
            elif name.startswith("leases/") and file.exists() and "damaged" not in dict(rows)["lease"]:
                unseen.append(f"{name}: {what}")
        file.write_bytes(whole)
    check(place)
    return unseen


def test_every_byte_of_a_sealed_file_counts(tmp_path):
    file = tmp_path / "sealed.json"
    whole = seal({"small": 1.5e-7, "name": "é", "list": [1, 2.0, None]}, where=file)
    unseal(whole, where=file)
    for at in range(len(whole)):
        for spoilt in (whole[:at], *(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :] for bit in range(8))):
            with pytest.raises(RunError):
                unseal(spoilt, where=file)


def check_a_run(path):
    return check_run(Run.open(path))


@pytest.mark.parametrize("store", ["run", "cohort"])
def test_damage_is_seen(request, store):
    unseen = silent(request.getfixturevalue(store), check_a_run if store == "run" else check_cohort, np.random.default_rng(0), 150)
    assert not unseen, unseen[:5]


@pytest.mark.slow
def test_ten_thousand(run, cohort, say):
    seen = {}
    for place, check, count in ((run, check_a_run, 6000), (cohort, check_cohort, 4000)):
        unseen = silent(place, check, np.random.default_rng(1), count)
        seen[place.name] = count, unseen
    say("; ".join(f"{name}: {count} damages, {len(unseen)} unseen" for name, (count, unseen) in seen.items()))
    assert not any(unseen for _, unseen in seen.values()), seen


def test_fits_do_not_read_damaged_values(cohort, tmp_path):
    """Without any check: what is read is right or refused."""
    whole = open_cohort(cohort, study.plain).read("x")
    rng, refused = np.random.default_rng(2), 0
    for i in range(30):
        place = tmp_path / f"{i}.zarr"
        shutil.copytree(cohort, place)
        files = sorted(p for p in place.rglob("*") if p.is_file() and "truth" not in p.parts)
        damage(files[rng.integers(len(files))], rng)
        try:
            opened = open_cohort(place, study.plain)
            opened.check_values()
            np.testing.assert_array_equal(opened.read("x"), whole)
        except CohortError:
            refused += 1
    assert refused >= 25


def test_a_cohort_that_others_wrote(tmp_path):
    """No manifest: a lost chunk is refused, a flipped bit is found where the codec has a checksum; and the check says so."""
    data = xr.Dataset({"x": (("g", "i"), np.ones((6, 3)))})
    data.to_zarr(tmp_path / "plain.zarr", zarr_format=3, consolidated=False)
    assert "no manifest" in dict(check_path(tmp_path / "plain.zarr"))["cohort"]
    chunk = next((tmp_path / "plain.zarr" / "x").rglob("c/0/0"))
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-3])
    with pytest.raises(CohortError):
        check_path(tmp_path / "plain.zarr")
    chunk.unlink()
    with pytest.raises(CohortError, match="missing from the store"):
        check_path(tmp_path / "plain.zarr")


def test_paths_that_are_neither(tmp_path):
    with pytest.raises(InputError, match="neither a run nor a cohort"):
        check_path(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match="damaged"):
        check_path(tmp_path)


def test_the_run_of_a_cohort_inside_it_is_refused(tmp_path):
    """The user's cohort would be taken for the run's own copy and cleared away."""
    study.cohort("plain").to_zarr(tmp_path / "cohort.zarr", zarr_format=3, consolidated=False)
    with pytest.raises(InputError, match="among the run's own files"):
        study.begin(tmp_path, "plain", tmp_path / "cohort.zarr")
    assert (tmp_path / "cohort.zarr" / "zarr.json").exists()

"""Hostile and broken input of every kind: typed errors only, and nothing in it is executed or leads out of its place."""

import hashlib
import json
import pickle
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from distributed.protocol import Serialized
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pavi_scale as ps
from pavi_scale.checking import check_path
from pavi_scale.cohort import foreign, open_cohort
from pavi_scale.config import load_model, load_study
from pavi_scale.durable import seal, unseal
from pavi_scale.errors import CohortError, ModelError, PaviError, RunError, StudyError, WorkerError
from pavi_scale.lease import newest
from pavi_scale.posterior.integrity import verify
from pavi_scale.run import Run
from pavi_scale.server.answer import aligned
from pavi_scale.server.runtime.wire import pack, rebuild, unpack
from tests.faults import study

fixed = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
few = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8) | st.sampled_from(["..", "/etc", "a\0b", "-1", "1e9"])
values = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "run"
    study.begin(path, "plain")
    return path


@pytest.fixture
def canary(tmp_path):
    """A command that leaves a trace where it is executed, and a check that none was."""
    trace = tmp_path / "executed"
    yield f"touch {trace}"
    assert not trace.exists()


class Hostile:
    """Unpickled, it runs a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return subprocess.call, (["sh", "-c", self.command],)


def changed(data, document):
    """A JSON document with one node, anywhere in it, replaced, added or removed."""
    document = json.loads(json.dumps(document))
    node, path = document, []
    while isinstance(node, (dict, list)) and node and (not path or data.draw(st.integers(0, 3))):
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else list(range(len(node)))))
        path.append((node, key))
        node = node[key]
    if not path:
        return document
    holder, key = path[-1]
    if data.draw(st.integers(0, 3)) == 0:
        del holder[key]
    else:
        holder[key] = data.draw(values)
    return document


# -- study files ------------------------------------------------------------------------------------------------------

STUDY = b"model: pipelines.radon:model\ncohort: data/radon.zarr\nrun: runs/radon\nfit: {encoding: auto, memory: 4 GiB, seed: 0}\n"
TAGS = ["!!python/object/apply:os.system ['{}']", "!!python/object/new:os.system ['{}']", "!!python/name:os.system", "!!python/module:os", "!<x> y", "&a [*a]"]


@given(st.integers(0, len(STUDY)), st.integers(0, 12), st.binary(max_size=8) | st.sampled_from([b"!!", b"&a ", b"*a", b"\0", b"\xff", b"{", b"? ", b"<<: "]))
@fixed
def test_a_study_changed_anywhere(tmp_path, at, length, put):
    (tmp_path / "s.yaml").write_bytes(STUDY[:at] + put + STUDY[at + length :])
    try:
        load_study(tmp_path / "s.yaml")
    except StudyError:
        pass


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("key", ["model", "run", "fit"])
def test_yaml_tags_do_not_run(tmp_path, canary, tag, key):
    (tmp_path / "s.yaml").write_text(f"{key}: {tag.format(canary)}\n")
    with pytest.raises(StudyError):
        load_study(tmp_path / "s.yaml")


@given(st.text(max_size=30) | st.sampled_from(["os:system", "../evil:model", "a.b:c", ":", "x:y:z", "sys:modules", "builtins:eval", "pavi_scale:fit"]))
@few
def test_model_paths(path):
    with pytest.raises(StudyError):
        load_model(path)


# -- names ------------------------------------------------------------------------------------------------------------

names = st.text(max_size=12) | st.sampled_from(["../x", "/etc/passwd", "a/b", "..", "", "\0", "c", "zarr.json", "x" * 300, "é", "a.b", "mu", "draw"])


@given(names, names, names)
@fixed
def test_names_cannot_leave(plate, variable, dim):
    law = study.plain.variables["mu"].law
    try:
        made = ps.Model(ps.Plate(plate), sizes={dim: 2}, **{variable: ps.latent(law, plates=plate, dims=dim)})
    except ModelError:
        return
    for name in (*made.plates, *made.variables, *made.dims):
        assert name.isidentifier()
        assert len(name.encode()) <= 120


@given(st.sampled_from(["plates", "sizes"]), values)
@few
def test_plates_and_sizes_of_any_type(where, value):
    try:
        if where == "plates":
            ps.Plate(value, within=value)
        else:
            ps.Model(sizes={"k": value})
    except PaviError:
        pass


# -- runs -------------------------------------------------------------------------------------------------------------


def resealed(path, change):
    """Change a sealed file, digest and all, and whatever vouches for it."""
    path.write_bytes(seal(change({k: v for k, v in unseal(path.read_bytes(), where=path).items()}), where=path))


def vouch(run):
    """Make the chain of digests of the current generation hold again."""
    place = next(p for p in sorted((run / "generations").iterdir(), reverse=True))
    files = {n: [(place / n).stat().st_size, hashlib.sha256((place / n).read_bytes()).hexdigest()] for n in ("weights.safetensors", "state.json")}
    resealed(place / "manifest.json", lambda d: d | {"files": files})
    told(run)


def told(run):
    place = next(p for p in sorted((run / "generations").iterdir(), reverse=True))
    digest = hashlib.sha256((place / "manifest.json").read_bytes()).hexdigest()
    resealed(run / "run.json", lambda d: d | {"manifests": {**d["manifests"], str(int(place.name)): digest}})


def use(path):
    """Everything that reads a run."""
    run = Run.open(path)
    run.kept, run.generation, run.events(), newest(path / "leases")
    for call in (run.latest, run.verify, run.state, lambda: check_path(path)):
        try:
            call()
        except RunError:
            pass
    with run.lock():
        pass


@given(st.data(), st.sampled_from(["run.json", "manifest.json", "state.json", "study.json", "lease", "posterior"]))
@few
def test_hostile_documents_with_right_digests(finished, tmp_path_factory, data, name):
    path = tmp_path_factory.mktemp("hostile") / "run"
    shutil.copytree(finished, path)
    place = next(p for p in sorted((path / "generations").iterdir(), reverse=True))
    elsewhere = {"run.json": path / name, "study.json": path / name, "posterior": path / "posterior.zarr" / "manifest.json"}
    file = next((path / "leases").glob("0*.json")) if name == "lease" else elsewhere.get(name, place / name)
    try:
        resealed(file, lambda d: changed(data, d))
    except PaviError:
        return  # not sealable: a number that JSON has not
    if name == "state.json":
        vouch(path)
    if name == "manifest.json":
        told(path)
    for call in (use, ps.open_posterior if name != "state.json" else use, lambda p: verify(p / "posterior.zarr")):
        try:
            call(path)
        except PaviError:
            pass
    shutil.rmtree(path)


@given(st.data())
@few
def test_hostile_weights_with_right_digests(finished, tmp_path_factory, data):
    """The header of a safetensors file is JSON after its length: any change of it is refused or harmless."""
    path = tmp_path_factory.mktemp("weights") / "run"
    shutil.copytree(finished, path)
    file = next(p for p in sorted((path / "generations").iterdir(), reverse=True)) / "weights.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.dumps(changed(data, json.loads(whole[8 : 8 + length]))).encode()
    told_length = data.draw(st.sampled_from([len(header), 0, 2**63, 2**31]) | st.integers(0, 2 * len(header)))
    file.write_bytes(told_length.to_bytes(8, "little") + header + whole[8 + length :])
    vouch(path)
    try:
        Run.open(path).latest()
    except RunError:
        pass
    shutil.rmtree(path)


def test_a_pickle_for_weights_does_not_run(finished, tmp_path, canary):
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    for name in ("weights.safetensors", "state.json"):
        file = next(p for p in sorted((path / "generations").iterdir(), reverse=True)) / name
        whole = file.read_bytes()
        file.write_bytes(pickle.dumps(Hostile(canary)))
        with pytest.raises(RunError):
            Run.open(path).latest()
        vouch(path)
        with pytest.raises(RunError):
            Run.open(path).latest()
        file.write_bytes(whole)
        vouch(path)


def test_a_run_brings_no_code(finished, tmp_path, canary, monkeypatch):
    """A copied run that names a file within itself as its model's is not executed."""
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    (path / "evil.py").write_text(f"import subprocess\nsubprocess.call(['sh', '-c', {canary!r}])\n")
    fresh = {"import": "evil_module:model", "file": str(path / "evil.py"), "fingerprint": "0" * 8}
    resealed(path / "study.json", lambda d: d | {"study": d["study"] | {"model": fresh}})
    for file in (path / "evil.py", Path("evil.py"), path / "x" / ".." / "evil.py"):
        resealed(path / "study.json", lambda d, file=file: d | {"study": d["study"] | {"model": fresh | {"file": str(file)}}})
        monkeypatch.chdir(path)
        with pytest.raises(RunError, match="cannot be imported"):
            ps.open_posterior(path)


def test_links_do_not_lead_out(finished, tmp_path):
    outside = tmp_path / "outside"
    for place in ("posterior.zarr/posterior_mean/theta", "posterior.zarr/posterior_mean", "cohort.zarr/x", "generations/000002"):
        path = tmp_path / "run"
        shutil.copytree(finished, path)
        (path / place).rename(outside)
        (path / place).symlink_to(outside)
        with pytest.raises((RunError, CohortError), match="link|leaves the store"):
            check_path(path)
        shutil.rmtree(path)
        shutil.rmtree(outside)


# -- cohorts ----------------------------------------------------------------------------------------------------------


def pickled_store(path, command):
    """A Zarr 2 store whose labels are pickles that run a command."""
    group = zarr.open_group(path, mode="w", zarr_format=2)
    x = group.create_array("x", shape=(6, 3), dtype="f8", compressors=None)
    x[:] = 1.0
    x.attrs["_ARRAY_DIMENSIONS"] = ["g", "i"]
    (path / "g").mkdir()
    metadata = {"zarr_format": 2, "shape": [6], "chunks": [6], "dtype": "|O", "fill_value": None, "order": "C", "compressor": None}
    (path / "g" / ".zarray").write_text(json.dumps(metadata | {"filters": [{"id": "pickle"}]}))
    (path / "g" / ".zattrs").write_text(json.dumps({"_ARRAY_DIMENSIONS": ["g"]}))
    (path / "g" / "0").write_bytes(pickle.dumps(Hostile(command)))


def test_a_pickle_in_a_cohort_does_not_run(tmp_path, canary):
    pickled_store(tmp_path / "c.zarr", canary)
    with pytest.raises(CohortError, match="codec"):
        open_cohort(tmp_path / "c.zarr", study.plain)
    with pytest.raises(CohortError, match="codec"):
        check_path(tmp_path / "c.zarr")


def test_the_pickle_would_run(tmp_path):
    """Power: what is refused would be executed by whoever reads it."""
    pickle.loads(pickle.dumps(Hostile(f"touch {tmp_path / 'ran'}")))
    assert (tmp_path / "ran").exists()


def test_huge_chunks_are_refused(tmp_path):
    for zarr_format in (2, 3):
        group = zarr.open_group(tmp_path / f"{zarr_format}.zarr", mode="w", zarr_format=zarr_format)
        named = {"dimension_names": ("g", "i")} if zarr_format == 3 else {"attributes": {"_ARRAY_DIMENSIONS": ["g", "i"]}}
        group.create_array("x", shape=(1 << 20, 1 << 20), chunks=(1 << 20, 1 << 10), dtype="f8", **named)
        with pytest.raises(CohortError, match="chunks are too large"):
            open_cohort(tmp_path / f"{zarr_format}.zarr", study.plain)


@given(st.data())
@few
def test_hostile_metadata(tmp_path_factory, data):
    """Any node of the metadata replaced: the cohort is read rightly typed, or refused."""
    path = tmp_path_factory.mktemp("metadata") / "c.zarr"
    study.cohort("plain").to_zarr(path, zarr_format=3, consolidated=False)
    file = path / data.draw(st.sampled_from(["zarr.json", "x/zarr.json", "g/zarr.json"]))
    file.write_text(json.dumps(changed(data, json.loads(file.read_text()))))
    for call in (lambda: open_cohort(path, study.plain).check_values(), lambda: foreign.check_store(path)):
        try:
            call()
        except CohortError:
            pass
    shutil.rmtree(path)


# -- the wire ---------------------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(-3, 2**40), max_size=3) | st.text(max_size=3) | st.none()
entries = st.tuples(values, st.sampled_from(["<f8", "|O", "|V1000", "<U4", "S0", "|S9999999999", "M8[ns]", "f8,f8", "?", "bad"]) | values, shapes)
payloads = st.binary(max_size=64) | st.lists(st.binary(max_size=16), max_size=3).map(lambda frames: Serialized({}, frames)) | values


@given(st.fixed_dictionaries({"arrays": st.lists(entries, max_size=3) | values, "data": payloads}) | st.dictionaries(st.text(max_size=3), values))
@settings(max_examples=200)
def test_hostile_answers(message):
    try:
        for array in unpack(message).values():
            assert array.dtype.kind not in "OV"
            assert array.nbytes <= 64
    except WorkerError:
        pass


@given(st.dictionaries(st.sampled_from(["types", "what", "where", "got"]), values | st.just(["PaviError"]) | st.just(["__builtins__", "annotations"])))
@fixed
def test_hostile_errors(message):
    assert isinstance(rebuild(message, "task 1"), PaviError)


def test_a_pickle_in_an_answer_does_not_run(canary):
    packed = pickle.dumps(Hostile(canary))
    for message in (
        {"arrays": [("x", "|O", (1,))], "data": packed},
        {"arrays": [("x", "|O", (1,))], "data": Serialized({"serializer": "pickle"}, [packed])},
        {"head": packed},
    ):
        with pytest.raises(WorkerError):
            unpack(message)
    assert unpack(pack({"x": aligned(np.arange(3.0))}))["x"].tolist() == [0.0, 1.0, 2.0]


def test_npy_and_netcdf_are_no_way_in(tmp_path, canary):
    """A pickled file where a store is expected."""
    (tmp_path / "c.zarr").write_bytes(pickle.dumps(Hostile(canary)))
    with pytest.raises(CohortError):
        open_cohort(tmp_path / "c.zarr", study.plain)
    with pytest.raises((ValueError, OSError)):
        xr.open_datatree(tmp_path / "c.zarr", engine="pavi")

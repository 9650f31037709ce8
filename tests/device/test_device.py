"""A fit on another device than the processor: the same posterior, nothing read or mixed across, and refusals before any compute.

There is no graphics card where these tests run. `second` is a device of its own to torch, with the rules of one: see there.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from filelock import FileLock

from pavi_scale.device import array, check_room, doubles, find, on, tensor
from pavi_scale.errors import InputError
from pipelines import gre


@pytest.fixture(scope="session")
def found(root, tmp_path_factory, worker_id):
    """What `tests.device.fits` prints, from a process of its own: a device is registered for good. Processes that share the tests share it."""
    if worker_id == "master":
        return fits(root, tmp_path_factory.mktemp("device"))
    kept = tmp_path_factory.getbasetemp().parent / "device.json"
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            kept.write_text(json.dumps(fits(root, tmp_path_factory.mktemp("device"))))
    return json.loads(kept.read_text())


def fits(root, folder):
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-m", "tests.device.fits", str(folder)], cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("study", ["gre", "items", "crossed", "hcp"])
def test_a_device_finds_the_processor_s_posterior(found, study):
    assert found[study]["operations"] > 1000, "nothing was computed there"
    assert found[study]["gap"] < 1e-9


@pytest.mark.cluster
def test_workers_compute_on_theirs(found):
    """Both together: one may be ready so early that it does it all."""
    assert found["workers"]["operations"] > 1000
    assert found["workers"]["gap"] < 1e-9


def test_too_little_memory_there_is_said_before_any_compute(found):
    assert "the device has too little memory" in found["refused"]
    assert "1.0 MiB" in found["refused"]


@pytest.mark.parametrize("rule", ["numpy", "mixed"])
def test_the_second_device_has_a_card_s_rules(root, rule):
    """Without these a fit that reads or mixes across devices would pass."""
    code = {"numpy": "torch.ones(2, device='second').numpy()", "mixed": "torch.ones(2, device='second') + torch.ones(2)"}[rule]
    call = [sys.executable, "-c", f"import torch; from tests.device import second; {code}"]
    done = subprocess.run(call, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode != 0
    assert {"numpy": "not supported", "mixed": "others on the processor"}[rule] in done.stderr


@pytest.mark.parametrize("name", ["abacus", "meta", "cuda:99", 3, None])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(InputError, match="device is not available"):
        find(name)


def test_the_border_keeps_values_and_shares_memory():
    x = np.arange(6.0, dtype=np.float32)
    assert tensor(x).data_ptr() == x.ctypes.data
    assert array(tensor(x)).ctypes.data == x.ctypes.data
    assert doubles(tensor(x).requires_grad_()).dtype == np.float64
    with on(torch.device("cpu")):
        assert torch.zeros(1).device.type == "cpu"
    check_room(torch.device("cpu"), 1 << 60)  # of the processor the planner takes care


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_card_finds_the_processor_s_posterior(tmp_path):
    from tests.device.fits import fit, gap

    gre.make_cohort(str(tmp_path / "gre.zarr"), groups=50, observations=4)
    assert gap(fit(gre.model, str(tmp_path / "gre.zarr"), "cpu"), fit(gre.model, str(tmp_path / "gre.zarr"), "cuda")) < 1e-6

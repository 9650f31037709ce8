"""A small numeric computation that travels to workers by value: they need not be able to import the tests."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pavi_scale.errors import CohortError, NumericalError


@pytest.fixture(scope="session")
def make_spec():
    """Builder of specs whose computation misbehaves on demand."""

    class Numeric:
        def __init__(self, threads=1, broken=False):
            self.threads, self.broken = threads, broken

        def build(self):
            if self.broken:
                raise CohortError("the store cannot be read", where="cohort.zarr", remedy="mend it")
            return self

        def compute(self, kind, state, task):
            if kind == "numeric":
                noise = np.random.default_rng(task["seed"]).standard_normal(state["w"].shape)
                product = torch.from_numpy(state["w"]) @ torch.from_numpy(noise).T
                return {"product": product.numpy(), "total": np.asarray(product.sum().item()), "units": task["units"] * 2}
            if kind == "who":
                time.sleep(task.get("sleep", 0.0))
                return {"pid": np.asarray(os.getpid()), "threads": np.asarray(torch.get_num_threads()), "slept": np.asarray(task.get("sleep", 0.0))}
            if kind == "die once":
                marker = Path(task["marker"])
                if not marker.exists():
                    marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return {"y": state["w"] + task["seed"]}
            if task.get("bad"):
                if kind == "refuse":
                    raise NumericalError("value is not finite", where="alpha[3]", got="nan")
                raise ValueError("deliberate")
            return {"y": state["w"]}

    return Numeric


@pytest.fixture
def state():
    return {"w": np.random.default_rng(0).standard_normal((37, 53)).T}


@pytest.fixture
def tasks():
    return [{"seed": i, "units": np.arange(i, i + 5), "name": ("county", [i])} for i in range(7)]

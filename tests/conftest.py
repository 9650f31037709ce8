"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# Wall time says nothing about correctness on a busy machine; in CI the examples are the same on every run.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root():
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared():
    """Folder of the real tables and their reference posteriors, which are not part of the repository."""
    path = Path(os.environ.get("PAVI_SHARED", ROOT.parent / "shared"))
    if not (path / "data").is_dir():
        pytest.skip(f"no real tables at {path}: put them there or name their folder with PAVI_SHARED")
    return path


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=20, help="kills of the slow chaos test (make chaos: 200)")
    parser.addoption("--sequences", type=int, default=1000, help="sequences of the slow property test of the proxy")

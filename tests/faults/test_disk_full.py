"""A disk that fills up at any moment of a fit: a typed error, the last checkpoint sound, and after freeing the undisturbed result."""

import os
import subprocess

import numpy as np
import pytest

from pavi_scale.errors import PaviError
from pavi_scale.run import Run
from tests.faults import study

SIZE = 64 << 20


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    place = tmp_path_factory.mktemp("disk")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no file system may be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def free(place):
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize


def fill(place, left):
    """Take all but `left` bytes."""
    with open(place / "filler", "wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, free(place) - left)
    assert abs(free(place) - left) <= 8192


def sweep(disk, kind, levels):
    """At each level of free space: fit, be stopped or not, look at what is there, free the space and go on."""
    before = free(disk)
    study.begin(disk / "whole", kind)
    wanted, need = study.digest(disk / "whole"), before - free(disk)
    subprocess.run(["rm", "-r", str(disk / "whole")], check=True)
    stopped = []
    for level in np.linspace(0.0, 1.02, levels):
        path = disk / "run"
        fill(disk, 1 + int(level * need))
        try:
            study.begin(path, kind)
        except PaviError as error:
            stopped.append(str(error))
        if path.exists() and (path / "run.json").exists():
            run = Run.open(path)
            if run.generation is not None:
                run.verify()
                run.latest()
        (disk / "filler").unlink()
        study.go_on(path, kind)
        assert study.digest(path) == wanted, f"level {level}"
        subprocess.run(["rm", "-r", str(path)], check=True)
    assert all("disk is full" in words or "does not fit on the disk" in words for words in stopped), stopped
    return len(stopped)


def test_a_full_disk(disk):
    assert sweep(disk, "plain", 6) >= 3


@pytest.mark.slow
def test_thirty_levels(disk, say):
    stopped = {kind: sweep(disk, kind, 30) for kind in study.MODELS}
    say(f"30 levels of free space each: stopped by the full disk {stopped}, 0 damaged, all resumed to the same bits")
    assert min(stopped.values()) >= 20

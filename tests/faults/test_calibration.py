"""Simulation-based calibration of fits that were each killed once, at a random moment, and resumed."""

import signal

import numpy as np
import pytest

import pavi_scale as ps
from pavi_scale.calibration.simulated import append, empty, quantities, rank
from tests.faults import study

RANKS = 255


def killed_and_resumed(zygote, path, kind, at):
    """The posterior of a fit that was killed at the given share of its calls on the disk."""
    assert zygote.run(path, kind, kill_at=at) == -signal.SIGKILL
    assert zygote.run(path, kind) == 0, path.with_suffix(".error").read_text()
    return ps.open_posterior(path, model=study.rows)


def run(zygote, folder, runs):
    """Ranks of the truth in killed fits, as they are and with half the variance, and the places of the kills."""
    whole = folder / "whole"
    assert zygote.run(whole, f"{study.SIMULATED} 0") == 0
    calls, rng, places = int(whole.with_suffix(".count").read_text()), np.random.default_rng(4), []
    fair = halved = None
    for seed in range(runs):
        kind, truth = f"{study.SIMULATED} {seed}", study.simulated(seed)
        plan = quantities(study.rows, truth, 8)
        fair, halved = (empty(plan, RANKS, "") if old is None else old for old in (fair, halved))
        places.append(int(rng.integers(1, 0.8 * calls)))  # fits differ a little in their number of calls
        posterior = killed_and_resumed(zygote, folder / str(seed), kind, places[-1])
        fair = append(fair, rank(posterior, truth, plan, RANKS, seed), posterior.status)
        halved = append(halved, rank(posterior, truth, plan, RANKS, seed, shrink=0.5), posterior.status)
    return fair, halved, places


def test_a_killed_fit_keeps_its_posterior(zygote, tmp_path):
    """The killed fit's stored moments are those of an undisturbed one, bit for bit."""
    kind = f"{study.SIMULATED} 0"
    assert zygote.run(tmp_path / "whole", kind) == 0
    calls = int((tmp_path / "whole").with_suffix(".count").read_text())
    for part in (0.3, 0.8):
        killed_and_resumed(zygote, tmp_path / str(part), kind, int(part * calls))
        assert study.digest(tmp_path / str(part)) == study.digest(tmp_path / "whole")


@pytest.mark.slow
def test_killed_fits_are_calibrated(zygote, tmp_path, say):
    fair, halved, places = run(zygote, tmp_path, 100)
    say(f"{len(places)} fits killed at calls {min(places)} to {max(places)} and resumed; smallest p {fair.pvalues.min():.3f}, "
        f"with half the variance {halved.pvalues.min():.1e}")
    print(fair, fair.table(), halved, sep="\n")
    assert len(set(places)) > 50
    assert fair.calibrated()
    assert not halved.calibrated()

"""ArviZ draws what the posterior holds."""

from __future__ import annotations

from pathlib import Path

import arviz_plots
import matplotlib as mpl
import numpy as np
import pytest

from pavi_scale.posterior.posterior import Posterior
from pavi_scale.run import Run
from tests.posterior import toy


@pytest.mark.parametrize("plot", ["plot_forest", "plot_dist"])
def test_arviz_plots_the_tree(finished: Path, plot: str) -> None:
    with mpl.rc_context({"backend": "Agg"}):
        drawn = getattr(arviz_plots, plot)(Posterior(Run.open(finished), toy.context()).datatree, var_names=["theta"], backend="matplotlib")
        figure = drawn.viz["figure"].item()
        figure.canvas.draw()
        lines = [line for axes in figure.axes for line in axes.lines]
        assert any(np.isfinite(line.get_xdata()).all() for line in lines)
        mpl.pyplot.close(figure)

"""Posterior predictive checks: are the observations like what the fitted model would see again?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import pandas as pd

from pavi_scale.calibration.truth import choose
from pavi_scale.posterior.posterior import Posterior

STATISTICS = ("mean", "sd", "5 %", "50 %", "95 %", "least", "most")


@dataclass(frozen=True)
class Predictive:
    """Observed values of one variable beside their replicates.

    Args:
        observed: Values looked at, `[N]`; missing ones left out.
        replicated: The same of each draw, `[draws, N]`.
    """

    observed: np.ndarray
    replicated: np.ndarray

    def table(self) -> pd.DataFrame:
        """A row for each statistic T: observed, median and 90 % interval of the replicated, and the Bayesian p-value.

        p = P(T(replicated) > T(observed)) + half the probability that they are equal (Gelman, Meng and Stern 1996): near 0 or 1 where the model
        does not see what it was shown. Not uniform under the model, but drawn to 1/2: the data were used for the fit.
        """
        seen, again = statistics(self.observed), statistics(self.replicated)
        p = (again > seen).mean(1) + 0.5 * (again == seen).mean(1)
        columns = {"observed": seen[:, 0], "replicated": np.median(again, 1), "5 %": np.quantile(again, 0.05, 1), "95 %": np.quantile(again, 0.95, 1), "p": p}
        return pd.DataFrame(columns, index=list(STATISTICS))


def statistics(values: np.ndarray) -> np.ndarray:
    """The statistics of values `[..., N]`, `[statistics, draws]`."""
    rows = np.atleast_2d(values)
    return np.stack([rows.mean(1), rows.std(1), *np.quantile(rows, [0.05, 0.5, 0.95], axis=1), rows.min(1), rows.max(1)])


def predictive_check(posterior: Posterior, draws: int = 200, values: int = 2000, seed: int = 0) -> dict[str, Predictive]:
    """Observed variables beside replicates of the same units.

    Args:
        posterior: The posterior.
        draws: Replicates.
        values: Values looked at of each variable, about: units of the largest plates are chosen at random.
        seed: Of that choice.
    """
    rng = np.random.default_rng(seed)
    tree = posterior.datatree
    found: dict[str, Predictive] = {}
    for v in posterior.model.of_kind("observed"):
        observed, replicated = (tree[group].dataset[v.name] for group in ("observed_data", "posterior_predictive"))
        sizes: Mapping[str, int] = {str(d): n for d, n in observed.sizes.items()}
        units = choose(rng, {p: sizes[p] for p in v.plates}, values // max(1, prod(sizes[d] for d in v.dims)))
        seen = observed.transpose(*v.plates, *v.dims).isel(units).values.astype(np.float64).ravel()
        again = replicated.isel(units | {"chain": 0, "draw": slice(draws)}).values.reshape(-1, seen.size)
        known = np.isfinite(seen)
        if known.any():
            found[v.name] = Predictive(seen[known], again[:, known])
    return found

"""Tables of a posterior: mean, sd and quantiles of global variables or of chosen units."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import pandas as pd

from pavi_scale.posterior.posterior import Posterior

QUANTILES = (0.05, 0.5, 0.95)
ROWS = 400  # of a table for people


def summary_table(posterior: Posterior, sel: Mapping[str, Any] | None = None, rows: int = ROWS) -> pd.DataFrame:
    """Mean, sd and 5/50/95 % quantiles.

    Args:
        posterior: The posterior.
        sel: Plate or event dimension -> label; variables that have all of these are shown. By default, variables without plates.
        rows: At most so many rows; variables that would exceed them are left out, and named in `attrs["left out"]`.

    Returns:
        One row for each element, named such as `alpha[AITKIN]`.
    """
    moments, sd, draws = (posterior.datatree[group].dataset for group in ("posterior_mean", "posterior_sd", "posterior"))
    sel = dict(sel or {})
    found: dict[str, list[float]] = {}
    left_out = []
    for v in posterior.model.latents:
        if not (sel.keys() <= {*v.plates, *v.dims} if sel else not v.plates):
            continue
        mean = moments[v.name].sel(sel)
        if len(found) + prod(mean.shape) > rows:
            left_out.append(v.name)
            continue
        spread = sd[v.name].sel(sel)
        quantiles = np.quantile(draws[v.name].sel(sel).values, QUANTILES, axis=(0, 1))
        labels = [mean[d].values.tolist() if d in mean.coords else list(range(n)) for d, n in mean.sizes.items()]
        for position, names in zip(np.ndindex(*mean.shape), itertools.product(*labels), strict=True):
            shown = ", ".join(str(sel[d]) if d in sel else str(names[list(mean.sizes).index(d)]) for d in (*v.plates, *v.dims))
            values = [mean.values[position], spread.values[position], *(q[position] for q in quantiles)]
            found[f"{v.name}[{shown}]" if shown else v.name] = [float(x) for x in values]
    table = pd.DataFrame.from_dict(found, orient="index", columns=["mean", "sd", *(f"{100 * q:.0f} %" for q in QUANTILES)])
    table.attrs["left out"] = left_out
    return table

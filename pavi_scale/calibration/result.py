"""What simulation-based calibration found: ranks, their tests, coverage and picture."""

from __future__ import annotations

import html
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from pavi_scale.calibration.uniformity import Bands, holm, uniform_pvalues, wilson
from pavi_scale.durable import disk_errors, replace_bytes, seal, unseal
from pavi_scale.errors import InputError, RunError
from pavi_scale.pictures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "pavi-scale-sbc"
VERSION = 1
LEVEL = 0.01  # chance that a calibrated model and fit are called miscalibrated
FAILED = "failed"
LEVELS = (0.5, 0.9)


@dataclass(frozen=True)
class SBC:
    """Ranks of simulated truths among the draws of their posteriors; uniform if the fits are calibrated (Talts et al. 2018, arXiv 1804.06788).

    Args:
        dataset: Variable `rank` (simulation, quantity): how many of `draws` (an attribute) draws lie below the truth, int; `status` (simulation), that of the
            fit, "failed" where there is none. Coordinates of `quantity`: `quantity`, a label such as "theta[2nd unit]", and `latent`, its variable.
    """

    dataset: xr.Dataset

    @property
    def draws(self) -> int:
        """Draws that a truth is ranked among."""
        return int(self.dataset.attrs["draws"])

    @property
    def runs(self) -> int:
        """Simulations finished, failed ones included."""
        return int(self.dataset.sizes["simulation"])

    @property
    def failures(self) -> int:
        """Simulations whose fit failed."""
        return int((self.dataset["status"] == FAILED).sum())

    @cached_property
    def _ranks(self) -> np.ndarray:
        """Ranks of the fits that did not fail, `[N, quantities]`."""
        return self.dataset["rank"].values[self.dataset["status"].values != FAILED]

    @property
    def _bands(self) -> Bands:
        return Bands(len(self._ranks), self.draws + 1)

    @cached_property
    def pvalues(self) -> pd.Series[float]:
        """p-value of each quantity under uniform ranks (see `uniformity`), adjusted for the number of quantities (Holm)."""
        found = uniform_pvalues(self._ranks, self.draws + 1) if len(self._ranks) else np.full(self.dataset.sizes["quantity"], np.nan)
        return pd.Series(holm(found), index=self.dataset["quantity"].values, name="p-value")

    def calibrated(self, level: float = LEVEL) -> bool:
        """Whether no quantity's ranks are refuted at `level` (for all together), and no fit failed."""
        return bool(self.runs and not self.failures and (self.pvalues >= level).all())

    @property
    def latents(self) -> tuple[str, ...]:
        """Variables looked at."""
        return tuple(dict.fromkeys(self.dataset["latent"].values.tolist()))

    def coverage(self, latent: str, level: float) -> tuple[float, float, float]:
        """Share of a variable's truths inside their central intervals of probability `level`, and its 95 % confidence interval.

        Quantities of one simulation share a fit, and are not independent: the interval is Wilson's of the effective number of trials, which
        is their number over the design effect (Kish 1965), the variance of the share over simulations relative to independent trials.
        """
        middle = (self._ranks[:, self.dataset["latent"].values == latent] + 0.5) / (self.draws + 1)
        inside = np.abs(2 * middle - 1) <= level
        share, (runs, each) = float(inside.mean()), inside.shape
        expected = share * (1 - share) / each
        effect = max(1.0, float(inside.mean(1).var(ddof=1)) / expected) if runs > 1 and expected > 0 else 1.0
        return share, *wilson(share, inside.size / effect)

    def table(self) -> pd.DataFrame:
        """A row for each variable: quantities looked at, the smallest adjusted p-value, coverage of 50 and 90 % intervals with confidence intervals."""
        rows = {}
        for latent in self.latents:
            own = self.dataset["latent"].values == latent
            row: list[Any] = [int(own.sum()), float(self.pvalues[own].min())]
            for level in LEVELS:
                row += self.coverage(latent, level) if len(self._ranks) else [np.nan] * 3
            rows[latent] = row
        columns = ["quantities", "p-value", *(f"{100 * level:.0f} %{part}" for level in LEVELS for part in (" covers", " low", " high"))]
        return pd.DataFrame.from_dict(rows, orient="index", columns=columns)

    def plot(self, figure: Figure | None = None, level: float = LEVEL) -> Figure:
        """Empirical distribution of ranks less the uniform one, a panel for each variable and a line for each quantity, with the simultaneous band."""
        names = self.latents
        columns = min(4, len(names))
        rows = -(-len(names) // columns)
        figure = figure or new_figure(3 * columns, 2.4 * rows)
        panels = np.ravel(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False))
        bands, pvalues = self._bands, self.pvalues.to_numpy()
        # The band of one quantity at Bonferroni's level, so that any line leaving it is told.
        low, high = bands.limits(level / len(pvalues))
        share = bands.cuts / bands.values
        lines = bands.counts(self._ranks) / max(1, bands.ranks) - share[:, None]
        for name, axes in zip(names, panels, strict=False):
            axes.fill_between(share, low / bands.ranks - share, high / bands.ranks - share, color="0.88", lw=0)
            for column in np.flatnonzero(self.dataset["latent"].values == name):
                axes.plot(share, lines[:, column], lw=0.9, color="C3" if pvalues[column] < level else "C0")
            axes.set_title(name, fontsize=9)
        for axes in panels[len(names) :]:
            axes.set_axis_off()
        figure.supxlabel("rank / draws", fontsize=9)
        figure.supylabel("ECDF - uniform", fontsize=9)
        return figure

    # -- on disk --------------------------------------------------------------------------------------------------------------

    def to_dataset(self) -> xr.Dataset:
        """The ranks as a Dataset."""
        return self.dataset

    @classmethod
    def from_dataset(cls, dataset: xr.Dataset) -> SBC:
        """The inverse of `to_dataset`.

        Raises:
            InputError: The Dataset is not one of ranks.
        """
        lacking = sorted({"rank", "status", "latent", "quantity"} - set(map(str, dataset.variables))) + ([] if "draws" in dataset.attrs else ["draws"])
        if lacking:
            raise InputError("a Dataset does not hold ranks of simulation-based calibration", where="SBC.from_dataset", got=f"no {', '.join(lacking)}")
        return cls(dataset)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the Dataset into a file, replacing what is there in one step."""
        target = Path(path)
        with disk_errors("ranks cannot be written", target):
            target.parent.mkdir(parents=True, exist_ok=True)
            replace_bytes(target, seal({"format": FORMAT, "version": VERSION, "dataset": self.dataset.to_dict()}, where=target))
        return target

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> SBC:
        """Read what `save` wrote.

        Raises:
            RunError: There is no such file, or it is damaged.
        """
        target = Path(path)
        with disk_errors("ranks cannot be read", target):
            document = unseal(target.read_bytes(), where=target)
        if document.get("format") != FORMAT or document.get("version") != VERSION:
            got = f"{document.get('format')} {document.get('version')}"
            raise RunError("the file does not hold ranks that this version reads", where=target, expected=f"{FORMAT} {VERSION}", got=got)
        return cls.from_dataset(xr.Dataset.from_dict(document["dataset"]))

    # -- what it looks like ---------------------------------------------------------------------------------------------------

    def _head(self) -> str:
        told = "calibrated" if self.calibrated() else "not calibrated"
        states = pd.Series(self.dataset["status"].values).value_counts()
        shown = ", ".join(f"{count} {status}" for status, count in states.items())
        return f"{told} (level {LEVEL:g}); {self.runs} simulations ({shown}), ranks among {self.draws} draws"

    def __repr__(self) -> str:
        return f"<pavi_scale.SBC> {self._head()}\n{self.table().to_string(float_format=lambda x: f'{x:.3g}')}"

    def _repr_html_(self) -> str:
        return f"<div><strong>pavi_scale.SBC</strong> {html.escape(self._head())}{self.table().to_html(float_format=lambda x: f'{x:.3g}')}</div>"

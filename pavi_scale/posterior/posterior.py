"""The fitted posterior as the user sees it."""

from __future__ import annotations

import html
import importlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pavi_scale.errors import InputError, RunError
from pavi_scale.memory import format_bytes, parse_bytes
from pavi_scale.pictures import new_figure
from pavi_scale.posterior.groups import all_groups, stored_group
from pavi_scale.posterior.predictive import Replicates
from pavi_scale.posterior.reducing import Summary, exceedances, in_memory, in_store, piece_lengths, quantiles, reduce_draws
from pavi_scale.posterior.sampler import DRAWS, Context, Latent, Sampler, fetch, load
from pavi_scale.posterior.selecting import Selected, select
from pavi_scale.run import Run

MEMORY = "512 MiB"  # of a summary's draws and result


class Posterior:
    """A fitted posterior: stored moments, lazy draws, diagnostics.

    Args:
        run: The run it lives in.
        context: Sampler, model and cohort of the run.

    Example of use::

        posterior = pavi_scale.fit(model, cohort, run="runs/radon")
        posterior.datatree["posterior_mean"]["alpha"].sel(county="AITKIN")
        posterior.sample(100, county=["AITKIN", "ANOKA"])
    """

    def __init__(self, run: Run, context: Context) -> None:
        self._run, self._context = run, context

    @classmethod
    def open(cls, run: Run, context: Context | None = None) -> Posterior:
        """The posterior of a run, its context obtained by the registered loader unless given."""
        return cls(run, context or load(str(run.path)))

    @property
    def run(self) -> str:
        """Path of the run directory."""
        return str(self._run.path)

    @property
    def model(self) -> Any:
        """The model that was fitted."""
        return self._context.model

    @cached_property
    def _state(self) -> dict[str, Any]:
        return self._run.state() if self._run.generation is not None else {}

    @property
    def status(self) -> str:
        """How far to believe the fit: "ok", "unconverged" or "unreliable"."""
        return str(self._state.get("status", "unconverged"))

    @cached_property
    def datatree(self) -> xr.DataTree:
        """All groups in ArviZ's schema; `posterior` is lazy: (chain, draw, *plates, *dims)."""
        return xr.DataTree.from_dict({f"/{name}": dataset for name, dataset in all_groups(self._run, self._context).items()})

    @property
    def diagnostics(self) -> xr.Dataset:
        """Per-unit diagnostics.

        Raises:
            RunError: The run was interrupted before they were computed.
        """
        return stored_group(self._run, "diagnostics")

    def _sampler(self, seed: int) -> Sampler:
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
            raise InputError("the seed must be a non-negative integer", where="seed", got=repr(seed))
        return self._context.sampler if seed == 0 else self._context.sampler.with_seed(int(seed))

    def sample(self, draws: int, seed: int = 0, **sel: Any) -> xr.Dataset:
        """Draws of a selection, in memory, dims (draw, *plates, *dims).

        Draw d of seed 0 is draw d of the lazy group `posterior`; another seed gives other numbers.

        Args:
            draws: Number of draws.
            seed: Stream of draws.
            **sel: Plate or event dimension -> label, list of labels or slice, as in `Dataset.sel` (positions where there are no labels).

        Raises:
            InputError: Unknown dimension or label, or `draws` is no positive integer.
        """
        _count(draws, "sample")
        latents = self._context.latents
        return _drawn(self._sampler(seed), latents, draws, select(self._context, latents, sel, "sample"), seed)

    def predict(self, draws: int = 100, seed: int = 0, **sel: Any) -> xr.Dataset:
        """Replicated observed variables of a selection, in memory, dims (draw, *plates, *dims): what the model expects to see again.

        Each replicate is drawn from the observed variable's law at one draw of the latents. Replicate d of seed 0 is draw d of the lazy group
        `posterior_predictive`.

        Args:
            draws: Number of replicates.
            seed: Stream of draws.
            **sel: As for `sample`, of the observed variables' plates and event dimensions, and of the plates that these lie within: `county="AITKIN"`
                leaves the houses of that county, in the cohort's order. Several such selections leave the units that lie within all of them.

        Raises:
            InputError: As for `sample`; also a single unit that does not lie within the one named beside it.
        """
        self._sampler(seed)
        _count(draws, "predict")
        replicates = Replicates(self._context, int(seed))
        variables = replicates.variables()
        return _drawn(replicates, variables, draws, select(self._context, variables, sel, "predict", below=True), seed)

    def quantile(self, latent: str, q: Any, *, draws: int = DRAWS, seed: int = 0, store: Any = None, memory: str | int = MEMORY, **sel: Any) -> xr.DataArray:
        """Quantiles of a latent's draws, unit by unit, dims (quantile, *plates, *dims); a single `q` adds no dimension.

        Exact for the draws, which are those of `sample`: the units are worked on in pieces, all draws of a piece at once. The error of a quantile of
        `draws` draws is about sqrt(q (1 - q) / draws) / (density there): 0.03 to 0.07 posterior sds for 1,000.

        Args:
            latent: Name of a latent.
            q: A number in [0, 1], or a list of such.
            draws: Number of draws.
            seed: Stream of draws.
            store: Path of a new Zarr store that the result is written to, piece by piece, instead of into memory; the array returned reads from there.
            memory: Limit on the bytes that draws and result take beside what one draw of a piece takes to compute.
            **sel: As for `sample`, of the latent's own plates and event dimensions.

        Raises:
            InputError: Unknown latent, dimension or label; `q` or `draws` out of range.
            PlanRefused: The result, or the draws of a single unit, are larger than `memory`.
            RunError: The store exists already, or the disk fails.
        """
        return self._reduced("quantile", latent, quantiles(q), draws, seed, store, memory, sel)

    def exceedance(
        self, latent: str, threshold: Any, *, draws: int = DRAWS, seed: int = 0, store: Any = None, memory: str | int = MEMORY, **sel: Any
    ) -> xr.DataArray:
        """Posterior probability that a latent lies above a threshold, unit by unit, dims (threshold, *plates, *dims); a single one adds no dimension.

        The share of draws above it, of standard error sqrt(p (1 - p) / draws) at most.

        Args:
            latent: Name of a latent.
            threshold: A finite number, or a list of such.
            draws: As for `quantile`.
            seed: As for `quantile`.
            store: As for `quantile`.
            memory: As for `quantile`.
            **sel: As for `quantile`.

        Raises:
            InputError: As for `quantile`.
            PlanRefused: As for `quantile`.
            RunError: As for `quantile`.
        """
        return self._reduced("exceedance", latent, exceedances(threshold), draws, seed, store, memory, sel)

    def _reduced(
        self, what: str, name: str, summary: Summary, draws: int, seed: int, store: Any, memory: str | int, sel: Mapping[str, Any]
    ) -> xr.DataArray:
        _count(draws, what)
        latent = next((v for v in self._context.latents if v.name == name), None)
        if latent is None:
            raise InputError("unknown latent", where=what, expected=f"one of {[v.name for v in self._context.latents]}", got=repr(name))
        # A label meant to select must not become a path that is written to.
        options = {"store": store is not None, "memory": memory != MEMORY}
        if both := [n for n, given in options.items() if given and n in (*latent.plates, *latent.dims)]:
            remedy = "select in what is returned, or in Posterior.datatree; or rename the plate"
            raise InputError("an argument may be an option or a plate", where=what, got=", ".join(both), remedy=remedy)
        chosen, budget, sampler = select(self._context, [latent], sel, what), parse_bytes(memory), self._sampler(seed)
        # Half of the memory is for the draws, half for the result.
        lengths = piece_lengths(latent, draws, budget // 2, self._blocks(latent))

        def run(write: Any) -> None:
            reduce_draws(sampler, latent, chosen, summary, draws, lengths, write)

        return in_memory(latent, chosen, summary, budget // 2, run) if store is None else in_store(latent, chosen, summary, lengths, Path(store), run)

    def _blocks(self, latent: Latent) -> dict[str, int]:
        """Plate -> length of the blocks that a latent's moments are stored in, in which its data were read; empty without a stored posterior."""
        moments = self.datatree.children.get("posterior_mean")
        lengths = moments[latent.name].encoding.get("preferred_chunks", {}) if moments is not None and latent.name in moments else {}
        return {p: int(lengths[p]) for p in latent.plates if p in lengths}

    def elbo(self, particles: int = 16, seed: int = 0) -> tuple[float, float]:
        """Evidence lower bound on the full data: (nats, standard error).

        Args:
            particles: Number of draws that it is averaged over, at least 2: one tells nothing about the spread that the standard error is made of.
                Four and more are drawn in antithetic pairs, so that an odd number is raised by one.
            seed: Stream of draws.

        Raises:
            InputError: `particles` is no integer above one.
        """
        if isinstance(particles, bool) or not isinstance(particles, (int, np.integer)) or particles < 2:
            raise InputError(
                "the number of particles must be an integer of at least 2", where="elbo", expected="two or more: the standard error is that of their mean",
                got=repr(particles), remedy="raise particles",
            )  # fmt: skip
        nats, error = self._context.sampler.elbo(int(particles), int(seed))
        return float(nats), float(error)

    def extend(self, new_cohort: Any) -> Any:
        """Posterior of new plate elements, without training (encoder and hybrid encodings).

        Raises:
            RunError: The encodings of this run have nothing to say about unseen units.
        """
        if self._context.extend is None:
            raise RunError(
                "this posterior cannot be extended",
                where=self.run,
                expected="encoder or hybrid encodings of every plate",
                got="rows of the fitted units",
                remedy="fit again with encoding='encoder' or 'hybrid'; where a plate's data are too many to be encoded, fit old and new units together",
            )
        return self._context.extend(new_cohort)

    def summary(self, **options: Any) -> Any:
        """ArviZ's table of the lazy draws (`arviz_stats.summary`); pass `var_names`, `ci_prob` and so on."""
        # Two seconds of import that fitting and planning need not pay.
        return importlib.import_module("arviz_stats").summary(self.datatree, **options)

    def plot_elbo(self, figure: Any = None) -> Any:
        """The ELBO trace of group `fit`, drawn on a new `matplotlib.figure.Figure` unless one is given.

        Raises:
            RunError: The run stores no trace.
        """
        trace = stored_group(self._run, "fit")
        if "elbo" not in trace:
            raise RunError("the run stores no ELBO trace", where=self.run, expected="variable 'elbo' in group 'fit'", got=sorted(map(str, trace.data_vars)))
        elbo = trace["elbo"]
        figure = figure or new_figure(6, 3)
        axes = figure.subplots()
        steps = trace[elbo.dims[0]].values
        axes.plot(steps, elbo.values, color="C0")
        finite = elbo.values[np.isfinite(elbo.values)]
        if finite.size > 10:
            # The first steps dwarf the rest: show the part that still says something.
            low, high = np.quantile(finite, 0.1), finite.max()
            axes.set_ylim(low - 0.05 * (high - low) - 1e-9, high + 0.05 * (high - low) + 1e-9)
        axes.set(xlabel=str(elbo.dims[0]), ylabel="ELBO (nats)", title=f"status: {self.status}")
        return figure

    # -- what it looks like -------------------------------------------------------------------------------------------

    def _rows(self) -> list[tuple[str, str, str, str]]:
        rows = []
        for v in self._context.latents:
            dims = ", ".join(f"{d}: {n:,}" for d, n in zip(v.axes, v.shape, strict=True))
            rows.append((v.name, f"({dims})", f"{v.size:,}", format_bytes(v.size * v.dtype.itemsize)))
        return rows

    def _facts(self) -> list[tuple[str, str]]:
        latents, cardinality = self._context.latents, self._context.layout.cardinality
        elbo = self._state.get("elbo")
        draw = sum(v.size * v.dtype.itemsize for v in latents)
        return [
            ("status", self.status),
            ("ELBO", "not recorded" if elbo is None else f"{float(np.ravel(elbo)[0]):,.2f} nats"),
            ("plates", ", ".join(f"{p} {n:,}" for p, n in cardinality.items()) or "none"),
            ("latents", f"{sum(v.size for v in latents):,}"),
            ("memory", f"{format_bytes(draw)} a draw, {format_bytes(2 * draw)} stored moments"),
            ("run", self.run),
        ]

    def __repr__(self) -> str:
        rows = self._rows()
        width = max((len(r[0]) for r in rows), default=0)
        lines = [f"  {name:<{width}}  {dims}  {count}" for name, dims, count, _ in rows]
        return "\n".join(["<pavi_scale.Posterior>", *(f"{key}: {value}" for key, value in self._facts()), *lines])

    def _repr_html_(self) -> str:
        facts = "".join(f"<tr><th style='text-align:left'>{key}</th><td>{html.escape(value)}</td></tr>" for key, value in self._facts())
        cells = "".join("<tr>" + "".join(f"<td style='text-align:left'>{html.escape(c)}</td>" for c in row) + "</tr>" for row in self._rows())
        head = "<tr><th>latent</th><th>dims</th><th>size</th><th>a draw</th></tr>"
        return f"<div><strong>pavi_scale.Posterior</strong><table>{facts}</table><table>{head}{cells}</table></div>"


def _drawn(sampler: Sampler, latents: Sequence[Latent], draws: int, chosen: Selected, seed: int) -> xr.Dataset:
    """The first draws of a selection, in memory, without the dimensions that single labels were given for."""
    values = fetch(sampler, latents, np.arange(draws), chosen.picks)
    data = {}
    for v in latents:
        data[v.name] = (("draw", *chosen.kept(v)), values[v.name][(slice(None), *(0 if d in chosen.scalar else slice(None) for d in v.axes))])
    return xr.Dataset(data, coords={"draw": np.arange(draws), **chosen.coords}, attrs={"seed": int(seed)})


def _count(draws: int, what: str) -> None:
    if isinstance(draws, bool) or not isinstance(draws, (int, np.integer)) or draws < 1:
        raise InputError("the number of draws must be a positive integer", where=what, got=repr(draws))

"""Selections of units as users write them, turned into positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from pavi_scale.errors import InputError
from pavi_scale.plates import Layout, ancestors
from pavi_scale.posterior.sampler import Context, Latent


@dataclass(frozen=True)
class Selected:
    """A resolved selection.

    Args:
        picks: Plate or event dimension -> positions, of the dimensions that the selection names.
        scalar: Dimensions that a single label was given for, and that are dropped.
        coords: Labels that remain, as coordinates of a Dataset.
    """

    picks: Mapping[str, np.ndarray]
    scalar: frozenset[str]
    coords: Mapping[str, Any]

    def kept(self, latent: Latent) -> tuple[str, ...]:
        """Axes of a latent that remain."""
        return tuple(d for d in latent.axes if d not in self.scalar)

    def positions(self, latent: Latent) -> dict[str, np.ndarray]:
        """Axis -> positions of a latent, dropped axes included."""
        return {d: self.picks.get(d, np.arange(n)) for d, n in zip(latent.axes, latent.shape, strict=True)}


def select(context: Context, latents: Sequence[Latent], sel: Mapping[str, Any], what: str, *, below: bool = False) -> Selected:
    """Resolve a selection on the dimensions of some latents.

    Args:
        context: Sizes and labels.
        latents: Those whose dimensions may be named.
        sel: Plate or event dimension -> label, list of labels or slice, as in `Dataset.sel` (positions where there are no labels).
        what: The user's call, for messages.
        below: Whether units of a plate stand for all that lie within them, too; plates that the latents' own lie within may then be named.

    Raises:
        InputError: Unknown dimension or label, an array of several dimensions, or a unit that does not lie within the one named beside it.
    """
    plates = context.layout.plates
    dims = dict.fromkeys(d for v in latents for d in v.axes)
    above = {d: ancestors(plates, d) if below and d in plates else () for d in dims}
    known = dims | dict.fromkeys(a for found in above.values() for a in found)
    # Positions under their labels: what selections are resolved on.
    positions = xr.Dataset({f"position of {d}": (d, np.arange(context.size(d))) for d in known}, {d: (d, x) for d, x in context.coords(list(known)).items()})
    if unknown := set(sel) - set(known):
        raise InputError("unknown dimension in a selection", where=what, expected=f"among {sorted(known)}", got=sorted(unknown))
    try:
        chosen = positions.sel(sel)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise InputError(
            "the selection cannot be resolved", where=what, expected="labels of the dimensions (positions where there are none)", got=f"{sel}: {error}"
        ) from error
    scalar = frozenset(d for d in sel if chosen[f"position of {d}"].ndim == 0)
    if deep := [d for d in sel if chosen[f"position of {d}"].ndim > 1]:
        raise InputError("a selection must be a label, a list or a slice", where=f"{what}, {deep[0]!r}", got="an array of several dimensions")
    named = {d: np.atleast_1d(chosen[f"position of {d}"].values) for d in sel}
    picks, coords = {d: p for d, p in named.items() if d in dims}, {str(n): c for n, c in chosen.coords.items()}
    for d in dims:
        if not any(a in named for a in above[d]):
            continue
        picks[d] = _within(context.layout, d, named.get(d, np.arange(context.size(d))), {a: named[a] for a in above[d] if a in named})
        if d in scalar and not picks[d].size:
            raise InputError("a unit does not lie within the one named beside it", where=f"{what}, {d!r}", got=str(dict(sel)), remedy="leave one of them out")
        if d in coords and d not in scalar:
            coords[d] = positions[d][picks[d]]
    # A plate that no latent has leaves a single label, not a dimension.
    return Selected(picks, scalar, {n: c for n, c in coords.items() if n in dims or c.ndim == 0})


def _within(layout: Layout, plate: str, units: np.ndarray, above: Mapping[str, np.ndarray]) -> np.ndarray:
    """Those of a plate's units, in their order, that lie within the given units of every plate above."""
    keep = np.ones(len(units), dtype=bool)
    for ancestor, chosen in above.items():
        keep &= np.isin(layout.path(plate, ancestor)[units], chosen)
    return units[keep]

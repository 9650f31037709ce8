"""Selections of units as users write them, turned into positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from pavi_scale.errors import InputError
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


def select(context: Context, latents: Sequence[Latent], sel: Mapping[str, Any], what: str) -> Selected:
    """Resolve a selection on the dimensions of some latents.

    Args:
        context: Sizes and labels.
        latents: Those whose dimensions may be named.
        sel: Plate or event dimension -> label, list of labels or slice, as in `Dataset.sel` (positions where there are no labels).
        what: The user's call, for messages.

    Raises:
        InputError: Unknown dimension or label, or an array of several dimensions.
    """
    dims = dict.fromkeys(d for v in latents for d in v.axes)
    # Positions under their labels: what selections are resolved on.
    positions = xr.Dataset({f"position of {d}": (d, np.arange(context.size(d))) for d in dims}, {d: (d, x) for d, x in context.coords(list(dims)).items()})
    if unknown := set(sel) - set(dims):
        raise InputError("unknown dimension in a selection", where=what, expected=f"among {sorted(dims)}", got=sorted(unknown))
    try:
        chosen = positions.sel(sel)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise InputError(
            "the selection cannot be resolved", where=what, expected="labels of the dimensions (positions where there are none)", got=f"{sel}: {error}"
        ) from error
    scalar = frozenset(d for d in sel if chosen[f"position of {d}"].ndim == 0)
    if deep := [d for d in sel if chosen[f"position of {d}"].ndim > 1]:
        raise InputError("a selection must be a label, a list or a slice", where=f"{what}, {deep[0]!r}", got="an array of several dimensions")
    picks = {d: np.atleast_1d(chosen[f"position of {d}"].values) for d in sel}
    return Selected(picks, scalar, {str(n): c for n, c in chosen.coords.items()})

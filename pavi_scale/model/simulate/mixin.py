"""What makes a model simulate itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pavi_scale.later import Later
from pavi_scale.model.protocol import ModelLike

if TYPE_CHECKING:
    import xarray as xr

    from pavi_scale.model.simulate import cohort
else:
    cohort = Later("pavi_scale.model.simulate.cohort")


class Simulated:
    """Mixin that gives a model its `sample`."""

    def sample(
        self: ModelLike,
        sizes: Mapping[str, int] | None = None,
        given: xr.Dataset | None = None,
        seed: int = 0,
        dtype: str = "float64",
        fixed: xr.Dataset | None = None,
    ) -> xr.Dataset:
        """One simulated cohort with every variable; see `pavi_scale.model.simulate.cohort.sample`."""
        return cohort.sample(self, sizes, given, seed, dtype, fixed)

"""The simulated truth that a cohort's store may hold in its group `truth`."""

from __future__ import annotations

import os

import xarray as xr
import zarr

from pavi_scale.cohort.foreign import text_as_it_is
from pavi_scale.cohort.readers import STORE_ERRORS


@text_as_it_is()
def open_truth(source: str | os.PathLike[str]) -> xr.Dataset | None:
    """Latents that a simulated cohort was made from, opened lazily; None where the store holds none."""
    try:
        group = zarr.open_group(os.fspath(source), mode="r")
        if not isinstance(group.get("truth"), zarr.Group):
            return None
        return xr.open_zarr(group.store, group=f"{group.path}/truth".lstrip("/"), chunks=None, consolidated=False)
    except STORE_ERRORS:
        return None

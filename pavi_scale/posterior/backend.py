"""The xarray engine `pavi`: a run directory opened as Datasets or as a DataTree."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import xarray as xr
from xarray.backends import BackendEntrypoint

from pavi_scale.errors import InputError
from pavi_scale.model.template import Model
from pavi_scale.posterior.groups import GROUPS, STORED, all_groups, derived_group, draw_count, stored_group
from pavi_scale.posterior.sampler import load
from pavi_scale.run import Run, is_run


class PaviBackendEntrypoint(BackendEntrypoint):
    """Opens runs of pavi-scale: `xarray.open_datatree(run, engine="pavi")`, `xarray.open_dataset(run, engine="pavi", group="posterior_mean")`."""

    description = "Open fitted runs of pavi-scale (lazy posterior draws, stored moments) in xarray"
    url = "https://github.com/pavi-scale/pavi-scale"
    open_dataset_parameters = ("filename_or_obj", "drop_variables", "group", "model", "draws")
    supports_groups = True

    def open_dataset(
        self,
        filename_or_obj: Any,
        *,
        drop_variables: str | Iterable[str] | None = None,
        group: str | None = "posterior",
        model: Model | None = None,
        draws: int | None = None,
    ) -> xr.Dataset:
        """One group of a run.

        Args:
            filename_or_obj: The run directory.
            drop_variables: Variables to leave out.
            group: One of `pavi_scale.posterior.groups.GROUPS`.
            model: The model, where it cannot be imported.
            draws: Number of draws of the group `posterior`.

        Raises:
            InputError: Unknown group.
            RunError: No run, or a damaged one.
        """
        name = (group or "posterior").strip("/")
        if name not in GROUPS:
            raise InputError("a run has no such group", where=os.fspath(filename_or_obj), expected=f"one of {list(GROUPS)}", got=repr(group))
        run = Run.open(filename_or_obj)
        dataset = stored_group(run, name) if name in STORED else derived_group(load(str(run.path), model), name, draw_count(run, draws))
        return _without(dataset, drop_variables)

    def open_groups_as_dict(
        self,
        filename_or_obj: Any,
        *,
        drop_variables: str | Iterable[str] | None = None,
        model: Model | None = None,
        draws: int | None = None,
    ) -> dict[str, xr.Dataset]:
        """All groups of a run by path; arguments as for `open_dataset`."""
        run = Run.open(filename_or_obj)
        groups = all_groups(run, load(str(run.path), model), draws)
        return {"/": xr.Dataset(), **{f"/{name}": _without(dataset, drop_variables) for name, dataset in groups.items()}}

    def open_datatree(
        self,
        filename_or_obj: Any,
        *,
        drop_variables: str | Iterable[str] | None = None,
        model: Model | None = None,
        draws: int | None = None,
    ) -> xr.DataTree:
        """All groups of a run; arguments as for `open_dataset`."""
        return xr.DataTree.from_dict(self.open_groups_as_dict(filename_or_obj, drop_variables=drop_variables, model=model, draws=draws))

    def guess_can_open(self, filename_or_obj: Any) -> bool:
        """A directory whose `run.json` has our format key."""
        return is_run(filename_or_obj)


def _without(dataset: xr.Dataset, names: str | Iterable[str] | None) -> xr.Dataset:
    wanted = [names] if isinstance(names, str) else list(names or ())
    return dataset.drop_vars([n for n in wanted if n in dataset.variables])

"""`model.sample` and `ps.simulate`: one simulated cohort, in memory or out of core."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import LocalStore

from pavi_scale.digests import COHORT
from pavi_scale.model.protocol import ModelLike
from pavi_scale.model.simulate.design import plan
from pavi_scale.model.simulate.generate import generate
from pavi_scale.model.simulate.sinks import Memory, Stored, chunk_lengths, open_new


def sample(
    model: ModelLike,
    sizes: Mapping[str, int] | None = None,
    given: xr.Dataset | None = None,
    seed: int = 0,
    dtype: str = "float64",
    fixed: xr.Dataset | None = None,
) -> xr.Dataset:
    """Draw one simulated cohort into memory.

    Args:
        model: The model.
        sizes: Cardinality of each plate, and sizes of event dimensions that `Model(sizes=)` does not fix.
        given: Covariates, index variables and coordinates, as in a cohort; sizes that it shows need not be given again. Its other variables are ignored.
            A covariate that it lacks is drawn standard normal (attribute `simulated`). An index that it lacks is drawn balanced:
            units are spread evenly over the first parent, in order, and at random over further ones.
        seed: Any integer; equal seeds give equal cohorts. torch's global generator is left as it was.
        dtype: "float64" or "float32".
        fixed: Latents that are not drawn but taken from here, as for predictive checks.

    Returns:
        Every latent, observed variable, covariate and index variable, dims `(*plates, *dims)`.

    Raises:
        InputError: Unknown or missing size, sizes that contradict each other, or bad `given`.
        ModelError: A law fails, or an event dimension has no size.
        NumericalError: A law's draw is not finite.

    Example:
        >>> from torch.distributions import Normal
        >>> from pavi_scale.model import Model, latent, observed
        >>> from pavi_scale.plates import Plate
        >>> m = Model(Plate("group"), mu=latent(lambda: Normal(0.0, 1.0)), x=observed(lambda mu: Normal(mu, 1.0), plates="group"))
        >>> dict(sample(m, {"group": 3}).sizes)
        {'group': 3}
    """
    design = plan(model, sizes or {}, given, fixed)
    sink = Memory()
    generate(design, sink, seed, np.dtype(dtype))
    out = xr.Dataset({name: (dims, values, attrs) for name, (dims, values, attrs) in sink.held.items()}, attrs={"seed": seed})
    return out.assign_coords(design.coords) if design.coords else out


def simulate(
    model: ModelLike,
    sizes: Mapping[str, int],
    store: Any,
    given: xr.Dataset | None = None,
    seed: int = 0,
    chunks: Mapping[str, int] | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> xr.Dataset:
    """Draw one simulated cohort into a Zarr v3 store, block by block: memory does not grow with cardinalities.

    The root group holds observed variables, covariates and index variables, its group `truth` the latents. Chunks are
    uncompressed (noise does not compress) and carry a crc32c checksum. The numbers do not depend on `chunks`, and with equal `dtype` are those of `sample`.

    Args:
        model: The model.
        sizes: As for `sample`.
        store: Path, URL (`memory://`, `s3://`, ...) or Zarr store.
        given: As for `sample`; read lazily.
        seed: As for `sample`.
        chunks: Chunk length along plates or event dimensions; by default chunks of about 16 MiB along the first plates.
        dtype: "float32" or "float64".
        overwrite: Replace what the store holds. A simulation that was cut short is replaced without being asked.

    Returns:
        The root group, opened lazily.

    Raises:
        InputError: As for `sample`; or the store already holds data.
    """
    design = plan(model, sizes, given, None)
    target = os.fspath(store) if isinstance(store, (str, os.PathLike)) else store
    with warnings.catch_warnings():
        # zarr says of every consolidation that other implementations may not know it; the store is readable without.
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        warnings.filterwarnings("ignore", message="The data type")
        root = open_new(target, overwrite)
        truth = root.create_group("truth")
        about: dict[str, Any] = {"complete": False, "model": model.fingerprint(), "seed": seed, "sizes": {**design.cardinality, **design.events}}
        root.attrs["pavi_simulation"] = about
        for group in (root, truth):
            if design.coords:
                labels = xr.Dataset(coords=design.coords)
                checked: dict[Any, dict[str, Any]] = {n: {"compressors": (Crc32cCodec(),), "write_empty_chunks": True} for n in labels.variables}
                labels.to_zarr(group.store, group=group.path, mode="a", zarr_format=3, consolidated=False, encoding=checked)
        sink = Stored(root, truth, chunk_lengths(design, chunks or {}, np.dtype(dtype).itemsize))
        generate(design, sink, seed, np.dtype(dtype))
        root.attrs["pavi_simulation"] = {**about, "complete": True, "sealed": isinstance(root.store, LocalStore)}
        for group in (truth, root):
            zarr.consolidate_metadata(group.store, path=group.path)
        if isinstance(root.store, LocalStore):
            COHORT.write(root.store.root, {"model": about["model"]})
        return xr.open_dataset(target, engine="zarr", chunks=None, cache=False)

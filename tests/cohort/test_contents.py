"""A store whose numbers are stored as they are is described without xarray, as xarray would describe it; all others are left to it."""

import numpy as np
import pytest
import xarray as xr
from torch.distributions import Normal

import pavi_scale as ps
from pavi_scale.cohort import open_cohort
from pavi_scale.cohort.contents import of_dataset
from pavi_scale.cohort.source import open_source
from pavi_scale.errors import CohortError


def dataset(**changes):
    data = {
        "x": (("subject", "run"), np.arange(12.0, dtype=np.float32).reshape(4, 3)),
        "age": ("subject", np.array([30.0, np.nan, 50.0, 60.0])),
        "at": ("subject", np.arange(4), {"instance_dimension": "site"}),
        "flag": ("subject", np.array([True, False, True, True])),
        "mass": ((), 3.0, {"units": "kg"}),
    }
    coords = {"subject": np.array(["a", "b", "c", "d"], dtype=object), "run": np.array([10, 20, 30])}
    return xr.Dataset(data | changes, coords=coords)


def stored(folder, made, **options):
    made.to_zarr(folder / "c.zarr", consolidated=False, **{"zarr_format": 3, **options})
    return open_source(str(folder / "c.zarr"), None)


def test_a_plain_store_is_described_as_xarray_describes_it(tmp_path):
    source = stored(tmp_path, dataset().drop_vars("flag"))
    assert source.decoded is None
    expected = of_dataset(source.dataset)
    assert source.contents.sizes == expected.sizes
    assert source.contents.variables.keys() == expected.variables.keys()
    for name, found in source.contents.variables.items():
        same = expected.variables[name]
        assert (found.dims, found.dtype.kind) == (same.dims, same.dtype.kind), name
        assert same.attrs.items() <= found.attrs.items(), name


PACKED = {
    "boolean": ({}, {}),
    "packed": ({"age": ("subject", np.arange(4.0))}, {"encoding": {"age": {"dtype": "int16", "scale_factor": 0.1, "_FillValue": -1}}}),
    "sentinel": ({"age": ("subject", np.arange(4.0))}, {"encoding": {"age": {"_FillValue": -1.0}}}),
    "times": ({"age": ("subject", np.array(["2020-01-01"] * 4, dtype="datetime64[ns]"))}, {}),
    "format 2": ({}, {"zarr_format": 2}),
}


@pytest.mark.parametrize("case", PACKED)
def test_what_is_coded_is_left_to_xarray(tmp_path, case):
    changes, options = PACKED[case]
    made = dataset(**changes)
    source = stored(tmp_path, made if case == "boolean" else made.drop_vars("flag"), **options)
    if case == "boolean" and source.decoded is None:  # stored as booleans, not as bytes that an attribute calls so
        assert source.contents.variables["flag"].dtype == bool
        return
    assert source.decoded is not None
    assert source.contents.variables["age"].dtype == source.dataset["age"].dtype


@pytest.mark.parametrize("labels", [["a", "b", "a", "c"], [3, 1, 2, 1]], ids=["text", "numbers"])
def test_a_repeated_label_is_found_wherever_the_cohort_lies(tmp_path, labels):
    model = ps.Model(ps.Plate("unit"), mu=ps.latent(lambda: Normal(0.0, 1.0)), x=ps.observed(lambda mu: Normal(mu, 1.0), plates="unit"))
    made = xr.Dataset({"x": ("unit", np.zeros(4))}, coords={"unit": np.array(labels, dtype=object if isinstance(labels[0], str) else None)})
    made.to_zarr(tmp_path / "c.zarr", zarr_format=3, consolidated=False)
    messages = []
    for source in (made, tmp_path / "c.zarr"):
        with pytest.raises(CohortError, match="same label") as found:
            open_cohort(source, model)
        messages.append(str(found.value))
    assert messages[0] == messages[1]

"""The cortical study, synthetic, in the shape of the Human Connectome Project's: networks x subjects x sessions x vertices.

`python -m pipelines.hcp demo` simulates it, plans, fits on two worker processes, queries the posterior, and writes a report.
`python -m pipelines.hcp simulate --size 100%` writes the cohort alone, for `pavi-scale fit pipelines/hcp.yaml`.
`python -m pipelines.hcp ingest FILES... --out data/hcp.zarr` makes it from surface data instead, `... maps RUN --out FOLDER` turns a posterior into such.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipelines.hcp.study import model

if TYPE_CHECKING:
    from pipelines.hcp.simulate import make_cohort

__all__ = ["make_cohort", "model"]


def __getattr__(name: str) -> Any:
    # Who plans or computes a study imports its model from here, and simulates nothing.
    if name != "make_cohort":
        raise AttributeError(f"module 'pipelines.hcp' has no attribute {name!r}")
    return import_module("pipelines.hcp.simulate").make_cohort

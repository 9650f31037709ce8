"""The cortical study, synthetic, in the shape of the Human Connectome Project's: networks x subjects x sessions x vertices.

`python -m pipelines.hcp demo` simulates it, plans, fits on two worker processes, queries the posterior, and writes a report.
`python -m pipelines.hcp simulate --size 100%` writes the cohort alone, for `pavi-scale fit pipelines/hcp.yaml`.
`python -m pipelines.hcp ingest FILES... --out data/hcp.zarr` makes it from surface data instead, `... maps RUN --out FOLDER` turns a posterior into such.
"""

from pipelines.hcp.simulate import make_cohort
from pipelines.hcp.study import model

__all__ = ["make_cohort", "model"]

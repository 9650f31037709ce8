"""The cortical study, synthetic, in the shape of the Human Connectome Project's: networks x subjects x sessions x vertices.

    python -m pipelines.hcp demo       # simulate -> plan -> fit on two worker processes -> query -> report
    python -m pipelines.hcp simulate   # the cohort alone; then: pavi-scale fit pipelines/hcp.yaml
"""

from pipelines.hcp.study import model
from pipelines.hcp.simulate import make_cohort

__all__ = ["make_cohort", "model"]

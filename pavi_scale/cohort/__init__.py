"""Cohorts: the data a model is fitted to, from memory, a table or a Zarr store."""

from pavi_scale.cohort.cohort import Cohort, CohortSpec, open_cohort
from pavi_scale.cohort.frame import from_table
from pavi_scale.cohort.schema import index_name
from pavi_scale.cohort.source import Origin

__all__ = ["Cohort", "CohortSpec", "Origin", "from_table", "index_name", "open_cohort"]

"""Simulated cohorts: draws of every latent and observed variable of a model."""

from pavi_scale.model.simulate.cohort import Simulated, sample, simulate

__all__ = ["Simulated", "sample", "simulate"]

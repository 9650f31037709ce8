"""Simulated cohorts: draws of every latent and observed variable of a model."""

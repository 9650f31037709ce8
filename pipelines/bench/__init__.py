"""What this package claims, measured: `python -m pipelines.bench`. Each measurement runs in a process of its own, at default settings."""

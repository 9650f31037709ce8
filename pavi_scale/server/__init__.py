"""Engines that execute rounds: in process, or on a Dask cluster through a parameter server."""

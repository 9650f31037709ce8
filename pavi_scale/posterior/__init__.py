"""The posterior: stored moments, lazy draws, the xarray engine `pavi`."""

"""What the studies' commands share: options, storing a cohort, fitting, printing."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xarray as xr

import pavi_scale as ps
from pavi_scale.errors import PaviError


def options(name: str, about: str | None, table: str | None = None) -> argparse.ArgumentParser:
    """Command line of a study.

    Args:
        name: The study's name.
        about: Its description.
        table: Public source of its table, which is then a required option.
    """
    parser = argparse.ArgumentParser(prog=f"python -m pipelines.{name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    if table:
        parser.add_argument("--table", required=True, metavar="CSV", help=f"the table; source: {table}")
    parser.add_argument("--cohort", default=f"data/{name}.zarr", help="Zarr store of the cohort, made unless it is there (%(default)s)")
    parser.add_argument("--run", default=f"runs/{name}", help="run directory (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only-cohort", action="store_true", help=f"stop after the cohort; then: pavi-scale fit pipelines/{name}.yaml")
    return parser


def store(cohort: xr.Dataset, path: str) -> None:
    """Write a cohort as a Zarr v3 store."""
    cohort.to_zarr(path, mode="w-", zarr_format=3, consolidated=False)


def provide(path: str, make: Callable[[], object]) -> None:
    """Make a cohort unless its store is there."""
    if Path(path).exists():
        print(f"cohort {path} is there already and is used as it is")
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    make()
    print(f"cohort written to {path}")


def fit(model: ps.Model, args: argparse.Namespace) -> Any:
    """Fit the model to the stored cohort and print the global variables; None with --only-cohort."""
    if args.only_cohort:
        return None
    posterior = ps.fit(model, args.cohort, run=args.run, seed=args.seed)
    print(posterior)
    print(posterior.summary(var_names=[v.name for v in model.latents if not v.plates], kind="stats"))
    return posterior


def start(module: str) -> None:
    """Run `main` of a module under its import path, not as `__main__`: a run records where its model can be imported from."""
    try:
        importlib.import_module(module).main()
    except PaviError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error

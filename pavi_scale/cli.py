"""The command `pavi-scale`: plan, fit, resume, posterior, report, check of a study file."""

from __future__ import annotations

import contextlib
import functools
import gc
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pavi_scale.errors import InputError, Interrupted, PaviError, PlanRefused
from pavi_scale.later import Later
from pavi_scale.memory import format_bytes

if TYPE_CHECKING:
    from pavi_scale.calibration import sbc
    from pavi_scale.calibration.given import given_of
    from pavi_scale.checking import check_path, check_run
    from pavi_scale.cohort import Cohort, open_cohort
    from pavi_scale.cohort.truth import open_truth
    from pavi_scale.config import Study, load_cluster, load_model, load_study
    from pavi_scale.digests import COHORT
    from pavi_scale.fitting import fit as fit_study
    from pavi_scale.fitting import open_posterior
    from pavi_scale.fitting import resume as resume_run
    from pavi_scale.posterior.posterior import Posterior
    from pavi_scale.reporting import report as write_report
    from pavi_scale.run import Run, is_run
    from pavi_scale.server.runtime.clusters import open_cluster
    from pavi_scale.settings import make_graph
    from pavi_scale.study import plan as plan_study
    from pavi_scale.summary import summary_table
else:  # each command imports what it needs: a plan is shown before a fit would have begun
    sbc, given_of = Later("pavi_scale.calibration:sbc"), Later("pavi_scale.calibration.given:given_of")
    check_path, check_run = Later("pavi_scale.checking:check_path"), Later("pavi_scale.checking:check_run")
    open_cohort, open_truth, COHORT = Later("pavi_scale.cohort:open_cohort"), Later("pavi_scale.cohort.truth:open_truth"), Later("pavi_scale.digests:COHORT")
    load_cluster, load_model, load_study = (Later(f"pavi_scale.config:load_{what}") for what in ("cluster", "model", "study"))
    fit_study, resume_run = Later("pavi_scale.fitting:fit"), Later("pavi_scale.fitting:resume")
    open_posterior, summary_table = Later("pavi_scale.fitting:open_posterior"), Later("pavi_scale.summary:summary_table")
    write_report, Run, is_run = Later("pavi_scale.reporting:report"), Later("pavi_scale.run:Run"), Later("pavi_scale.run:is_run")
    open_cluster, plan_study = Later("pavi_scale.server.runtime.clusters:open_cluster"), Later("pavi_scale.study:plan")
    make_graph = Later("pavi_scale.settings:make_graph")

app = typer.Typer(
    name="pavi-scale",
    help="Bayesian inference for very large hierarchical models. "
    "Exit codes: 0 done, 2 bad input, 3 refused by the plan, 4 not calibrated, 75 interrupted but resumable.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Checked = Annotated[str, typer.Argument(metavar="STUDY.yaml|RUN|COHORT", help="the study file, a run directory, or a cohort store")]
File = Annotated[str, typer.Argument(metavar="STUDY.yaml", help="the study file")]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="replace a value of the study, such as fit.seed=1; repeatable")]
Cluster = Annotated[str | None, typer.Option("--cluster", metavar="FILE.yaml", help="cluster file; replaces the study's own")]
Select = Annotated[list[str] | None, typer.Option("--sel", metavar="PLATE=LABEL", help="units of a plate to show; repeatable")]
Folder = Annotated[str | None, typer.Option("--out", metavar="FOLDER", help="where the report goes (default: RUN/report)")]

Calibrate = Annotated[bool, typer.Option("--sbc", help="simulation-based calibration: fit simulated cohorts, test ranks of truths; exit code 4 if they fail")]
Runs = Annotated[int, typer.Option("--runs", metavar="N", help="simulations of --sbc")]
Sizes = Annotated[list[str] | None, typer.Option("--sizes", metavar="PLATE=N", help="units of a top-level plate, the cohort's first, for --sbc; repeatable")]
MISCALIBRATED = 4


@functools.cache
def _prepare() -> None:
    """Import what all commands need.

    All the objects that torch makes are there to stay: looking for garbage among them would take a tenth of a second now, and half of one on leaving.
    """
    gc.disable()
    try:
        import_module("pavi_scale.study")
    finally:
        gc.enable()
    gc.freeze()


def _command(body: Callable[..., None]) -> Callable[..., None]:
    """Turn the package's errors into one sentence on standard error, and signals into exit code 75."""

    @functools.wraps(body)
    def guarded(*args: Any, **kwargs: Any) -> None:
        # As SIGINT, so that a scheduler's request to stop also ends at a checkpoint.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            _prepare()
            body(*args, **kwargs)
        except KeyboardInterrupt:
            _fail(Interrupted("interrupted before the run began", remedy="run the same command again"))
        except PaviError as error:
            _fail(error)
        finally:
            signal.signal(signal.SIGTERM, before)

    return guarded


def _fail(error: PaviError) -> None:
    sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
    raise typer.Exit(error.exit_code)


@contextlib.contextmanager
def _client(study: Study) -> Iterator[Any]:
    if study.cluster is None:
        yield None
        return
    with open_cluster(load_cluster(study.cluster)) as client:
        yield client


def _say(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(what) for what, _ in rows)
    for what, figure in rows:
        typer.echo(f"{what:<{width}}  {figure}")


@app.command()
@_command
def plan(study: File, settings: Settings = None, cluster: Cluster = None) -> None:
    """Show latents, bytes, memory, disk and steps; nothing is computed."""
    found = load_study(study, settings or (), cluster)
    workers = 0 if found.cluster is None else load_cluster(found.cluster).workers or 1
    options = found.fit.arguments()
    made = plan_study(load_model(found.model), found.cohort, **{key: options[key] for key in ("encoding", "memory") if key in options})
    free = _free_bytes(found.run)
    rows = [*made.table(), ("disk: free", format_bytes(free))]
    if workers:
        rows.append(("memory: all processes", f"{format_bytes((workers + 1) * made.peak_bytes)}, {workers} workers and the driver"))
    _say(rows)
    if made.disk_bytes > free:
        got, expected = f"{format_bytes(free)} free", f"{format_bytes(made.disk_bytes)} for the posterior"
        raise PlanRefused("the posterior does not fit on the disk", where=f"run {found.run!r}", expected=expected, got=got, remedy="free some, or move the run")


def _free_bytes(run: str) -> int:
    path = Path(run).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


@app.command()
@_command
def fit(study: File, settings: Settings = None, cluster: Cluster = None) -> None:
    """Fit the model to the cohort; the posterior goes into the run directory."""
    found = load_study(study, settings or (), cluster)
    model = load_model(found.model)
    # The cohort's faults are told before a cluster is started for it.
    open_cohort(found.cohort, model)
    with _client(found) as client:
        posterior = fit_study(model, found.cohort, run=found.run, client=client, **found.fit.arguments())
    typer.echo(repr(posterior))


@app.command()
@_command
def resume(study: File, settings: Settings = None, cluster: Cluster = None) -> None:
    """Go on with an interrupted fit."""
    found = load_study(study, settings or (), cluster)
    model = load_model(found.model)
    Run.open(found.run)
    with _client(found) as client:
        device = found.fit.device if "device" in found.fit.model_fields_set else None
        posterior = resume_run(found.run, model=model, client=client, progress=found.fit.progress, device=device)
    typer.echo(repr(posterior))


def _open(study: Study) -> Posterior:
    return open_posterior(study.run, model=load_model(study.model))


@app.command()
@_command
def posterior(study: File, settings: Settings = None, cluster: Cluster = None, sel: Select = None) -> None:
    """Print the summary of the posterior: global variables, or the units that --sel names."""
    found = _open(load_study(study, settings or (), cluster))
    chosen = _selection(found, sel or ())
    typer.echo(repr(found))
    table = summary_table(found, chosen)
    typer.echo("" if table.empty else f"\n{table.to_string(float_format=lambda x: f'{x:.4g}')}")


def _selection(posterior: Posterior, wanted: Sequence[str]) -> dict[str, Any]:
    """Plate -> label, of `plate=label` texts; a label is matched as text, then as YAML (a number)."""
    moments = posterior.datatree["posterior_mean"].dataset
    chosen: dict[str, Any] = {}
    for text in wanted:
        plate, equals, label = text.partition("=")
        if not equals or plate not in moments.sizes:
            raise InputError("a selection is `plate=label`", where=f"--sel {text!r}", expected=f"a plate or dimension among {sorted(map(str, moments.sizes))}")
        labels = moments.coords[plate].values.tolist() if plate in moments.coords else list(range(moments.sizes[plate]))
        match = [value for value in labels if str(value) == label]
        if not match:
            shown = ", ".join(map(str, labels[:5])) + (", ..." if len(labels) > 5 else "")
            raise InputError("no unit of that label", where=f"--sel {text!r}", expected=f"one of {len(labels):,} labels: {shown}", got=repr(label))
        chosen[plate] = match[0]
    return chosen


@app.command()
@_command
def report(study: File, settings: Settings = None, cluster: Cluster = None, out: Folder = None) -> None:
    """Write a page with the ELBO curve, the global variables and the diagnostics; with calibration where the cohort holds the truth."""
    found = load_study(study, settings or (), cluster)
    page = write_report(_open(found), out, truth=open_truth(found.cohort))
    typer.echo(f"report written to {page}")


@app.command()
@_command
def check(
    study: Checked, settings: Settings = None, cluster: Cluster = None, calibrate: Calibrate = False, runs: Runs = 100, sizes: Sizes = None
) -> None:
    """Verify the cohort (every value) and, where there is a run, its files against their digests; or calibrate (--sbc).

    A run directory or a cohort store may be named instead of a study: its files are then compared with their digests.
    """
    if Path(study).is_dir():
        _say(check_path(Path(study)))
        return
    found = load_study(study, settings or (), cluster)
    if found.cluster is not None:
        load_cluster(found.cluster)
    cohort = open_cohort(found.cohort, load_model(found.model))
    if calibrate:
        _calibrate(found, cohort, runs, sizes or ())
        return
    make_graph(cohort)  # by which it learns what its values may be
    cohort.check_values()
    if cohort.source is not None and COHORT.path(Path(cohort.source)).exists():
        COHORT.verify(Path(cohort.source))
    _say([("cohort", f"sound: {format_bytes(cohort.nbytes)}, {cohort.layout!r}")])
    if not is_run(found.run):
        typer.echo("run     none yet")
        return
    _say(check_run(Run.open(found.run)))


def _calibrate(study: Study, cohort: Cohort, runs: int, sizes: Sequence[str]) -> None:
    """Print the table of simulation-based calibration; finished simulations are kept in the run's folder `sbc`."""
    wanted: dict[str, int] = {}
    for text in sizes:
        plate, _, size = text.partition("=")
        if not size.isdecimal():
            raise InputError("a size is `plate=number`", where=f"--sizes {text!r}", expected="such as county=20")
        wanted[plate] = int(size)
    kept, given = given_of(cohort, wanted)
    options = study.fit.arguments()
    seed, progress = options.pop("seed", 0), options.pop("progress", True)
    with _client(study) as client:
        found = sbc(cohort.model, kept, runs, given, seed=seed, run=study.run, progress=progress, client=client, **options)
    typer.echo(repr(found))
    if not found.calibrated():
        raise typer.Exit(MISCALIBRATED)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command `pavi-scale`; exits with its code."""
    app(args=None if arguments is None else list(arguments), prog_name="pavi-scale")


if __name__ == "__main__":
    main()

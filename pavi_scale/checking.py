"""`pavi-scale check` of a run directory or of a cohort store without its study: every file against its digest."""

from __future__ import annotations

from pathlib import Path

from pavi_scale.cohort.foreign import check_store
from pavi_scale.digests import COHORT
from pavi_scale.errors import InputError
from pavi_scale.events import read
from pavi_scale.lease import newest
from pavi_scale.posterior.integrity import verify
from pavi_scale.recording import COPY
from pavi_scale.run import Run, is_run

Rows = list[tuple[str, str]]


def check_path(path: Path) -> Rows:
    """Verify a run directory or a cohort store; returns what was found sound, as (what, figure).

    Raises:
        InputError: It is neither, or it is damaged.
    """
    if is_run(path):
        return check_run(Run.open(path))
    if (path / "zarr.json").is_file() or (path / ".zgroup").is_file():
        return check_cohort(path)
    if (path / "run.json").exists():
        Run.open(path)  # says what is wrong with the pointer
    raise InputError("neither a run nor a cohort", where=path, expected="a directory with run.json, or a Zarr group", remedy="check the path")


def check_run(run: Run) -> Rows:
    """Verify every file of a run: pointer, study, generations, copied cohort, posterior, log.

    Raises:
        InputError: A file is damaged or missing.
    """
    events, torn = read(run.path / "events.jsonl")
    log = ("log", f"{len(events)} events" + (f", {torn} lines torn by a crash or damaged" if torn else ""))
    holder = newest(run.path / "leases")
    free = holder is None or not holder.alive
    lease = ("lease", "damaged: the run is free once it has been silent" if holder and not holder.document else "free" if free else f"held by {holder}")
    if run.generation is None:
        return [("run", "begun, nothing to verify yet"), log, lease]
    kept, state = run.verify(), run.state()
    status = f"{state.get('phase', 'unknown phase')}, status {state.get('status', 'none yet')}"
    rows = [("run", f"sound: generations {', '.join(map(str, kept))}, {status}"), log, lease]
    if run.read_study().get("cohort", {}).get("source") == COPY:
        rows.append(("copy of the cohort", f"sound: {COHORT.verify(run.path / COPY)} files as in their manifest"))
    if run.posterior_path.exists() or state.get("phase") == "done":
        rows.append(("posterior", f"sound: {verify(run.posterior_path)} files as in their manifest"))
    return rows


def check_cohort(path: Path) -> Rows:
    """Verify a cohort store: against its manifest, or, where others wrote it, that every chunk is there and decodes.

    Raises:
        CohortError: A file is damaged or missing.
    """
    if COHORT.path(path).exists():
        return [("cohort", f"sound: {COHORT.verify(path)} files as in their manifest")]
    arrays, checked = check_store(path)
    caution = "and there is no manifest: a flipped bit elsewhere may go unseen"
    return [("cohort", f"{arrays} arrays complete and readable; {checked} of them carry checksums, {caution}")]

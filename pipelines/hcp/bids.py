"""Which file holds which subject and session, by the entities in its name (Brain Imaging Data Structure, bids-specification.readthedocs.io)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pavi_scale.errors import CohortError

KINDS = (".dscalar.nii", ".dtseries.nii", ".func.gii")
# How data were processed or laid out: not what tells one session from another.
_PROCESSING = ("sub", "hemi", "space", "den", "res", "desc")
_ORDER = ("ses", "sample", "task", "tracksys", "acq", "ce", "trc", "stain", "rec", "dir", "run")
_ENTITY = re.compile(r"([A-Za-z]+)-([A-Za-z0-9+]+)")
_EXAMPLE = "sub-01_ses-1_task-rest_space-fsLR_den-91k_stat.dscalar.nii"


@dataclass(frozen=True)
class Found:
    """A complete table of files: every subject with every session.

    Args:
        kind: Their common extension, one of `KINDS`.
        subjects: Labels of the subjects, in natural order.
        sessions: Label of each session: its entities, joined.
        entities: Entity -> its value in each session ("" where a session has none), of the entities that tell sessions apart.
        files: (subject, session) -> its files: one, or one for each hemisphere in the order of `hemispheres`.
        hemispheres: "L", "R" or both for GIFTI; empty for CIFTI, which holds both.
    """

    kind: str
    subjects: tuple[str, ...]
    sessions: tuple[str, ...]
    entities: dict[str, tuple[str, ...]]
    files: dict[tuple[str, str], tuple[Path, ...]]
    hemispheres: tuple[str, ...]


def entities(path: Path) -> dict[str, str]:
    """Entities of a file name.

    Raises:
        CohortError: The name is not one of BIDS, or names no subject.

    Example:
        >>> entities(Path("sub-01_ses-2_task-rest_bold.dtseries.nii"))
        {'sub': '01', 'ses': '2', 'task': 'rest'}
    """
    parts = path.name.split(".")[0].split("_")
    matches = [_ENTITY.fullmatch(part) for part in parts]
    bad = [part for part, match in zip(parts[:-1], matches[:-1], strict=True) if match is None]
    out = {m.group(1): m.group(2) for m in matches if m}
    if bad or "sub" not in out:
        raise CohortError(
            "the file's name does not say whose data it holds", where=path, expected=f"a BIDS name such as {_EXAMPLE}",
            got=f"{bad[0]!r}, which is no entity-label pair" if bad else "no entity 'sub'", remedy="rename the file, or link it under a BIDS name",
        )  # fmt: skip
    return out


def kind_of(path: Path) -> str:
    """The extension of a surface file.

    Raises:
        CohortError: It is none that can be read.
    """
    for kind in KINDS:
        if path.name.endswith(kind):
            return kind
    raise CohortError("not a surface file that can be read", where=path, expected=f"one of *{', *'.join(KINDS)}", got=path.name)


def natural(label: str) -> list[tuple[bool, int, str]]:
    """Sorting key under which 2 comes before 10.

    Example:
        >>> sorted(["run-10", "run-2"], key=natural)
        ['run-2', 'run-10']
    """
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", label) if part]


def find(paths: Sequence[Path]) -> Found:
    """Arrange files by subject and session.

    Args:
        paths: Surface files, all of one kind; both hemispheres of GIFTI.

    Raises:
        CohortError: No files, several kinds, a name that is not BIDS, two files for one place, or a subject that lacks a session.
    """
    if not paths:
        raise CohortError("no files to read", where="ingest", expected=f"names of *{', *'.join(KINDS)} files")
    kinds = {kind_of(p): p for p in paths}
    if len(kinds) > 1:
        raise CohortError("files of several kinds", where=", ".join(map(str, kinds.values())), expected="one kind", got=", ".join(kinds))
    kind = next(iter(kinds))
    table: dict[tuple[str, str, str], Path] = {}
    told: dict[str, dict[str, str]] = {}
    for path in paths:
        named = entities(path)
        own = {k: named[k] for k in (*_ORDER, *sorted(set(named) - {*_ORDER, *_PROCESSING})) if k in named}
        session = "_".join(f"{k}-{v}" for k, v in own.items()) or "ses-1"
        told[session] = own
        place = named["sub"], session, _hemisphere(path, named) if kind.endswith(".gii") else ""
        if place in table:
            raise CohortError(
                "two files for the same subject and session", where=f"{table[place]} and {path}",
                expected="one file each, or an entity (run, task) that differs", got=f"subject {place[0]!r}, session {session!r} twice",
                remedy="name only the files that belong together",
            )  # fmt: skip
        table[place] = path
    hemispheres = tuple(sorted({h for _, _, h in table}))
    subjects, sessions = sorted({s for s, _, _ in table}, key=natural), sorted(told, key=natural)
    missing = [(s, t, h) for s in subjects for t in sessions for h in hemispheres if (s, t, h) not in table]
    if missing:
        first = ", ".join(f"{name} {label!r}" for name, label in zip(("subject", "session", "hemisphere"), missing[0], strict=True) if label)
        raise CohortError(
            "a subject lacks a session", where=first, expected=f"every one of {len(subjects)} subjects with every one of {len(sessions)} sessions",
            got=f"{len(missing)} of {len(subjects) * len(sessions) * len(hemispheres)} files missing", remedy="leave out such subjects, or such sessions",
        )  # fmt: skip
    files = {(s, t): tuple(table[s, t, h] for h in hemispheres) for s in subjects for t in sessions}
    names = [k for k in dict.fromkeys(k for own in told.values() for k in own)]
    columns = {k: tuple(told[t].get(k, "") for t in sessions) for k in names}
    return Found(kind, tuple(subjects), tuple(sessions), columns, files, tuple(h for h in hemispheres if h))


def _hemisphere(path: Path, named: dict[str, str]) -> str:
    if named.get("hemi") not in ("L", "R"):
        raise CohortError("the file's name does not say which hemisphere it holds", where=path, expected="hemi-L or hemi-R", got=named.get("hemi", "no 'hemi'"))
    return named["hemi"]

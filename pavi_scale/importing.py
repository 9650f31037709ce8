"""The model of a run, imported from where the run says that it was made.

A run holds no code: a pickle in it would be executed by whoever opens a run that was copied to them. It names an import path and a file instead.
A plain script makes its model and then fits it; to have the model again the file is executed under a name other than `__main__`, and left at the first
fit, resumption or opening that it comes to: the model has been made by then, with all that its laws look up, and what follows is the run's own work.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

from pavi_scale.errors import RunError
from pavi_scale.model.template import ANEW, Model

SCRIPT = "__main__"
GUARD = 'put all but the model under `if __name__ == "__main__":`, or pass model='
_importing: ContextVar[bool] = ContextVar("importing", default=False)


class Left(BaseException):
    """An imported script has come to its fit. Not an `Exception`: scripts that catch those are to be left as well."""


def leave_import() -> None:
    """End the import of a run's model, if one is going on here; called before anything that a script does with its model."""
    if _importing.get():
        raise Left


def import_model(stored: Mapping[str, Any], run: Path) -> Model | None:
    """Import a model by its recorded path, or from its recorded file - never one in the run directory: a run that was copied here brings no code.

    Args:
        stored: What the run says of its model: `import`, `file` and `fingerprint`.
        run: The run directory.

    Returns:
        The model, whose fingerprint may differ; None where nothing is found.

    Raises:
        RunError: The module or script raises, or comes to a fit before the model has been made.
    """
    path, file = stored["import"], stored["file"]
    if not path:
        return None
    name, attribute = path.split(":")
    usable = bool(file) and os.path.isabs(file) and os.path.exists(file) and not Path(file).resolve().is_relative_to(run.resolve())
    found = None
    with _left_early(file or name) as early, contextlib.suppress(ImportError):
        found = _model(importlib.import_module(name), attribute)
    # What runs as `__main__` now need not be the script that fitted.
    if found is not None and not (usable and name == SCRIPT and found.fingerprint() != stored["fingerprint"]):
        return found
    if not usable:
        return None
    spec = importlib.util.spec_from_file_location(f"{ANEW}{name}", file)
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    with _left_early(file) as early, _as_script(module, str(Path(file).parent) if name == SCRIPT else None):
        spec.loader.exec_module(module)
    found = _model(module, attribute)
    if found is None and early:
        raise RunError("the run's model cannot be imported", where=file, expected=f"{attribute!r} at module level", got="a fit before it", remedy=GUARD)
    return found


def _model(module: ModuleType, attribute: str) -> Model | None:
    found = getattr(module, attribute, None)
    return found if isinstance(found, Model) else None


@contextlib.contextmanager
def leaving_early() -> Iterator[None]:
    """What is imported within is left, with `Left`, at the first fit, resumption or opening that it comes to."""
    token = _importing.set(True)
    try:
        yield
    finally:
        _importing.reset(token)


@contextlib.contextmanager
def _left_early(where: str) -> Iterator[list[bool]]:
    """Import within: yields a list that holds something once the import has been left at a fit; what else is raised becomes a `RunError`."""
    early: list[bool] = []
    try:
        with leaving_early():
            yield early
    except Left:
        early.append(True)
    except (Exception, SystemExit) as error:
        got = f"{type(error).__name__}: {error}"
        raise RunError("the run's model cannot be imported", where=where, expected="a module or script that makes it", got=got, remedy=GUARD) from error


@contextlib.contextmanager
def _as_script(module: ModuleType, folder: str | None) -> Iterator[None]:
    """What a script finds while it runs: its folder among the importable ones, and its module (dataclasses look theirs up).

    The module is forgotten afterwards, so that its laws are sent to workers by value: those cannot import it.
    """
    sys.modules[module.__name__] = module
    if folder is not None:
        sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.modules.pop(module.__name__, None)
        if folder is not None:
            with contextlib.suppress(ValueError):
                sys.path.remove(folder)

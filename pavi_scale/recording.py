"""What a run says of its study - model, cohort, options, settings - and the way back from there."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pavi_scale.cohort import Cohort, open_cohort
from pavi_scale.digests import COHORT
from pavi_scale.errors import RunError
from pavi_scale.importing import import_model, leave_import
from pavi_scale.model.template import Model
from pavi_scale.run import Run
from pavi_scale.settings import Settings
from pavi_scale.study import Encoding, Study

COPY = "cohort.zarr"  # of a cohort that lives in memory, in the run
_known: weakref.WeakValueDictionary[str, Model] = weakref.WeakValueDictionary()


def encoding_record(encoding: Encoding) -> Any:
    """An encoding option as JSON."""
    if isinstance(encoding, str):
        return encoding
    return {(key if isinstance(key, str) else "*".join(key)): scheme for key, scheme in encoding.items()}  # type: ignore[arg-type]


def encoding_from(stored: Any) -> Encoding:
    """The inverse of `encoding_record`."""
    return stored if isinstance(stored, str) else dict(stored)


def record(run: Run, cohort: Cohort, study: Study, config: Mapping[str, Any]) -> None:
    """Write down what is fitted; a cohort that lives in memory is copied into the run."""
    model = cohort.model
    fingerprint = model.fingerprint()
    _known[fingerprint] = model
    path = model.import_path()
    module = sys.modules.get(path.split(":")[0]) if path else None
    source = cohort.source
    if source is None or source.startswith("memory:"):
        source = COPY
        cohort.save(run.path / source)
    run.write_study({
        "model": {"import": path, "file": getattr(module, "__file__", None), "fingerprint": fingerprint},
        "cohort": {"source": source, "fingerprint": cohort.fingerprint, "sizes": {**cohort.layout.cardinality, **cohort.event_sizes}},
        "config": dict(config), "settings": settings_record(study.settings), "plan": dict(study.plan.table()),
    })


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", populate_by_name=True)
    path: str | None = Field(alias="import")
    file: str | None
    fingerprint: str


class _Cohort(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    source: str = Field(min_length=1)
    fingerprint: str


class _Config(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    seed: int = Field(ge=0)
    staleness: int = Field(default=0, ge=0)
    encoding: str | dict[str, str]
    memory: str | int
    max_time: float | None = None


class _Settings(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    free: list[list[str]]
    schemes: dict[str, str]
    seen: dict[str, str] = Field(default_factory=dict)
    structure: dict[str, dict[str, Any]]
    split: str | None
    dtype: Literal["float32", "float64"]
    chunk: int = Field(gt=0)
    cache_bytes: int = Field(ge=0)


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    model: _Model
    cohort: _Cohort
    config: _Config
    settings: _Settings


def read_record(run: Run) -> dict[str, Any]:
    """What `record` wrote down, every part of it where and what it should be.

    Raises:
        RunError: Nothing was recorded, or it is damaged.
    """
    study = run.read_study()
    try:
        _Record.model_validate(study)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = f"{run.path / 'study.json'}, {'.'.join(map(str, fault['loc']))}"
        raise RunError("the run's study is not one", where=where, got=fault["msg"], remedy="restore the file from a copy, or fit again") from error
    return study


def settings_record(settings: Settings) -> dict[str, Any]:
    """Settings as JSON."""
    return {
        "free": [list(f) for f in settings.free], "schemes": dict(settings.schemes), "seen": dict(settings.seen),
        "structure": {k: dict(v) for k, v in settings.structure.items()}, "split": settings.split,
        "dtype": settings.dtype, "chunk": settings.chunk, "cache_bytes": settings.cache_bytes,
    }


def settings_from(stored: Mapping[str, Any]) -> Settings:
    """The inverse of `settings_record`.

    Raises:
        RunError: An earlier version made the run, and did not record what its set encoders read.
    """
    if "seen" not in stored and not {"encoder", "hybrid"}.isdisjoint(stored["schemes"].values()):
        raise RunError(
            "the run was made by an earlier version", where="its settings", expected="the variables that its set encoders read", got="none", remedy="fit again"
        )
    return Settings(
        free=tuple(tuple(f) for f in stored["free"]), schemes=stored["schemes"], seen=stored.get("seen", {}), structure=stored["structure"],
        split=stored["split"], dtype=stored["dtype"], cache_bytes=stored["cache_bytes"], chunk=stored["chunk"],
    )


def find_model(study: Mapping[str, Any], model: Model | None, run: Run) -> Model:
    """The run's model: the one given, one alive in this process, or imported; its fingerprint must be the recorded one."""
    leave_import()
    stored = study["model"]
    wanted = stored["fingerprint"]
    found = model or _known.get(wanted) or import_model(stored, run.path)
    if found is None:
        raise RunError(
            "the run's model cannot be imported",
            where=run.path,
            expected=stored["import"] or "a model at module level",
            got="nothing importable" if os.path.isabs(stored["file"] or "") else "no file: it was typed, or made in a function",
            remedy="pass model=, or define the model at the top level of a module",
        )
    if found.fingerprint() != wanted:
        raise RunError(
            "the model has changed since the run",
            where=run.path,
            expected=f"fingerprint {wanted}",
            got=found.fingerprint(),
            remedy="restore the model's code, or fit again in a new run",
        )
    return found


def reopen_cohort(study: Mapping[str, Any], model: Model, run: Run) -> Cohort:
    """The run's cohort; its fingerprint must be the recorded one where it lies outside the run."""
    stored = study["cohort"]
    if stored["source"] == COPY:
        COHORT.verify(run.path / COPY)
        return open_cohort(run.path / COPY, model)
    opened = open_cohort(stored["source"], model)
    if opened.fingerprint != stored["fingerprint"]:
        raise RunError(
            "the cohort has changed since the run",
            where=stored["source"],
            expected=f"fingerprint {stored['fingerprint']}",
            got=opened.fingerprint,
            remedy="restore the cohort, or fit again in a new run",
        )
    return opened

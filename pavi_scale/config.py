"""Study and cluster files: YAML read safely, checked key by key."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator

from pavi_scale.errors import PaviError, StudyError
from pavi_scale.importing import Left, leaving_early
from pavi_scale.model.template import Model
from pavi_scale.server.clusters import KINDS, Cluster, Strict

_MAX_BYTES = 1 << 20  # a study is a page of text; anything larger is not one


class FitOptions(Strict):
    """Section `fit` of a study: keyword arguments of `fit`.

    Args:
        encoding: "auto", "free", "encoder", "hybrid", or a mapping from plates ("subject" or "subject, vertex") to one of these.
        memory: Limit on memory, as "4 GiB" or in bytes.
        device: "auto", "cpu", or a device of the workers such as "cuda".
        max_time: Seconds after which the fit stops and can be resumed.
        seed: Seed of everything random.
        staleness: Updates that the weights which a minibatch step reads may be behind.
        progress: Whether to show a progress bar.
    """

    encoding: str | dict[str, str] = "auto"
    memory: str | int | None = None
    device: str = "auto"
    max_time: float | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0)
    staleness: int = Field(default=0, ge=0)
    progress: bool = True

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `fit`: those that the study sets."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        if isinstance(self.encoding, dict):
            given["encoding"] = {_plates(key): scheme for key, scheme in self.encoding.items()}
        return given


class Study(Strict):
    """A study file.

    Args:
        model: Import path of the model, `module:attribute`.
        cohort: Path or URL of the cohort's Zarr store.
        run: Run directory.
        fit: Options of the fit.
        cluster: Path of a cluster file, or None to fit in process.
    """

    model: str
    cohort: str
    run: str
    fit: FitOptions = FitOptions()
    cluster: str | None = None

    @field_validator("cohort", "run")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must not be empty")
        return value


def _plates(key: str) -> str | tuple[str, ...]:
    names = tuple(name.strip() for name in key.split(","))
    return names[0] if len(names) == 1 else names


# -- YAML -------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Plain values only: no tags, no aliases (which can grow without bound), no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", self.current_event.start_mark if self.current_event else None)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is there twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a subclass of SafeLoader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = where if mark is None else f"{where}, line {mark.line + 1}, column {mark.column + 1}"
        got = getattr(error, "problem", None) or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise StudyError("not readable as YAML", where=place, expected="plain YAML: keys, text, numbers, lists", got=got, remedy="correct the file") from error


def read_yaml(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Args:
        path: The file.
        what: "study" or "cluster", for messages.

    Raises:
        StudyError: Missing, unreadable, too large, not YAML, with tags or aliases, or not a mapping.
    """
    where = f"{what} file {os.fspath(path)!r}"
    try:
        with Path(path).open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        got = f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"
        raise StudyError(f"{what} file cannot be read", where=where, expected="a readable YAML file", got=got, remedy="check the path") from error
    if len(content) > _MAX_BYTES:
        raise StudyError(f"{what} file is too large", where=where, expected=f"at most {_MAX_BYTES} bytes", remedy="name the right file")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StudyError(f"{what} file is not text", where=where, expected="UTF-8", got=str(error), remedy="name the right file") from error
    found = _parse(text, where)
    if not isinstance(found, dict):
        raise StudyError(f"a {what} file is a mapping", where=where, expected="lines of `key: value`", got=f"{type(found).__name__}")
    return found


def override(document: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """`document` with `key=value` settings applied; keys are dotted, values are YAML.

    Raises:
        StudyError: A setting without `=`, an empty key, or a key below something that is not a mapping.

    Example:
        >>> override({"fit": {"seed": 0}}, ["fit.seed=3", "run=runs/other"])
        {'fit': {'seed': 3}, 'run': 'runs/other'}
    """
    out = {key: dict(value) if isinstance(value, dict) else value for key, value in document.items()}
    for setting in settings:
        key, equals, value = setting.partition("=")
        parts = [part.strip() for part in key.split(".")]
        if not equals or not all(parts):
            raise StudyError("a setting is `key=value`", where=f"--set {setting!r}", expected="such as fit.seed=1")
        node: Any = out
        for depth, part in enumerate(parts[:-1]):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
            if not isinstance(node, dict):
                above = ".".join(parts[: depth + 1])
                raise StudyError("a setting lies below a key that has no keys", where=f"--set {setting!r}", expected=f"a mapping at {above!r}", got=repr(node))
        node[parts[-1]] = _parse(value, f"--set {setting!r}")
    return out


# -- checks -----------------------------------------------------------------------------------------------------------

_Checked = TypeVar("_Checked", bound=Strict)


def _check(schema: type[_Checked], document: Mapping[str, Any], what: str, where: str) -> _Checked:
    try:
        return schema.model_validate(dict(document))
    except ValidationError as error:
        faults = error.errors(include_url=False)
        # An unknown key is most often the misspelt name of a missing one: say that first.
        fault = min(faults, key=lambda f: f["type"] != "extra_forbidden")
        raise _fault(schema, fault, what, where, len(faults) - 1) from error


def _fault(schema: type[BaseModel], fault: Any, what: str, where: str, others: int) -> StudyError:
    path = [str(part) for part in fault["loc"]]
    known = list(schema.model_fields)
    if len(path) > 1 and path[0] == "fit":
        known = list(FitOptions.model_fields)
    more = f" (and {others} more)" if others else ""
    at = f"{where}, key {'.'.join(path[:2])!r}" if path else where
    if fault["type"] == "extra_forbidden":
        close = difflib.get_close_matches(path[-1], known, n=3, cutoff=0.5)
        remedy = f"did you mean {' or '.join(repr(c) for c in close)}?" if close else "remove it"
        return StudyError(f"unknown {what} key{more}", where=at, expected=f"one of {', '.join(known)}", got=repr(".".join(path)), remedy=remedy)
    if fault["type"] == "missing":
        return StudyError(f"{what} key is missing{more}", where=at, expected=_EXAMPLES.get(path[-1], "a value"), remedy=f"add `{path[-1]}: ...`")
    message = str(fault["msg"]).removeprefix("Value error, ")
    return StudyError(f"{what} key has a wrong value{more}", where=at, expected=message[0].lower() + message[1:], got=repr(fault["input"])[:200])


_EXAMPLES = {
    "model": "an import path such as pipelines.radon:model",
    "cohort": "path or URL of a Zarr store",
    "run": "path of the run directory",
    "kind": "one of " + ", ".join(KINDS),
    "hosts": "a list of machines, such as [node1, node2]",
    "interface": "a network interface, such as eth0",
    "shared": "a directory that all nodes see",
    "address": "a scheduler, such as tls://scheduler:8786",
}


def load_study(path: str | os.PathLike[str], settings: Sequence[str] = (), cluster: str | None = None) -> Study:
    """The study of a file, with settings applied.

    Args:
        path: The YAML file.
        settings: Overrides, `key=value`.
        cluster: Path of a cluster file, which replaces the study's own.

    Raises:
        StudyError: The file cannot be read; a key is unknown, missing or has a wrong value.
    """
    document = override(read_yaml(path, "study"), settings)
    if cluster is not None:
        document["cluster"] = cluster
    return _check(Study, document, "study", f"study file {os.fspath(path)!r}")


def load_cluster(path: str | os.PathLike[str]) -> Cluster:
    """The cluster of a file; its key `kind` says which keys there are besides.

    Raises:
        StudyError: As for `load_study`.
    """
    document, where = read_yaml(path, "cluster"), f"cluster file {os.fspath(path)!r}"
    kind = document.get("kind")
    if "kind" in document and (not isinstance(kind, str) or kind not in KINDS):
        close = difflib.get_close_matches(str(kind), KINDS, n=1, cutoff=0.5)
        remedy = f"did you mean {close[0]!r}?" if close else "see cluster/README.md"
        raise StudyError("unknown kind of cluster", where=f"{where}, cluster key 'kind'", expected=f"one of {', '.join(KINDS)}", got=repr(kind), remedy=remedy)
    return _check(KINDS[kind or "local"], document, "cluster", where)


def load_model(path: str) -> Model:
    """The model at an import path `module:attribute`; the working directory is importable.

    Raises:
        StudyError: No such module or attribute, the module fails, or the attribute is not a Model.
        ModelError: The model is ill-formed.
    """
    where = f"study key 'model', {path!r}"
    name, colon, attribute = path.partition(":")
    if not colon or not all(part.isidentifier() for part in [*name.split("."), attribute]):
        raise StudyError("not an import path", where=where, expected="module:attribute, such as pipelines.radon:model", got=repr(path))
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module = _import(name, where)
    model = getattr(module, attribute, None)
    if not isinstance(model, Model):
        models = sorted(key for key, value in vars(module).items() if isinstance(value, Model))
        got = f"nothing of that name in module {name!r}" if not hasattr(module, attribute) else type(model).__name__
        remedy = f"did you mean {' or '.join(f'{name}:{m}' for m in models)}?" if models else "define the model at module level"
        raise StudyError("the import path does not lead to a model", where=where, expected="a pavi_scale.Model", got=got, remedy=remedy)
    return model


def _import(name: str, where: str) -> Any:
    load: Callable[[str], Any] = importlib.import_module
    try:
        with leaving_early():
            return load(name)
    except Left as left:
        # Half a module is of no use here: workers and later openings import the model from it, and would come to that fit again.
        remedy = 'put all but the model under `if __name__ == "__main__":`'
        raise StudyError("the model's module does more than make it", where=where, expected=f"a module {name!r} that makes the model",
                         got="a fit, resumption or opening while it is imported", remedy=remedy) from left
    except PaviError:
        raise
    except (Exception, SystemExit) as error:  # the user's module runs here, and may raise anything
        got = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise StudyError("the model's module cannot be imported", where=where, expected=f"an importable module {name!r}", got=got,
                         remedy="run pavi-scale in the folder that holds the module, or correct it") from error

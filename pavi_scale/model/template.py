"""The plate-enriched template graph: template variables, their laws and their parents."""

from __future__ import annotations

import hashlib
import inspect
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch.distributions import Distribution

from pavi_scale.errors import ModelError
from pavi_scale.model.diagram import Drawn
from pavi_scale.model.simulate.mixin import Simulated
from pavi_scale.plates import Plate, ancestors

Law = Callable[..., Distribution]
Kind = Literal["latent", "observed", "covariate"]
ANEW = "_pavi_."  # before the name of a module that is executed anew, to have its model again
PLAIN = (int, float, complex, str, bytes, bool, type(None))  # values whose representation is all there is of them
LONGEST_NAME = 120  # bytes; file systems allow 255, and names get suffixes
# Names that a posterior has a use for: a model that had them too would be fitted, and its posterior could not be read.
OF_DRAWS = ("chain", "draw")  # dimensions of draws, and their coordinates
OF_RESULTS = ("quantile", "threshold")  # dimensions of what `Posterior.quantile` and `Posterior.exceedance` return, and their coordinates
OF_CALLS = ("draws", "seed", "self")  # arguments of `Posterior.sample` and `Posterior.predict` beside a selection `plate=label`
OF_MODEL = ("self", "sizes")  # arguments of `Model` beside its variables


@dataclass(frozen=True)
class Variable:
    """One template variable. `name` and `parents` are filled in by `Model`.

    Args:
        kind: "latent", "observed" or "covariate".
        law: Callable that returns the law of one ground unit; its parameter names are the parents. None for a covariate.
        plates: Plates the variable lives on, in axis order.
        dims: Event dimensions, after the plates.
        missing: "mask" when NaN means "not observed".
    """

    kind: Kind
    law: Law | None
    plates: tuple[str, ...] = ()
    dims: tuple[str, ...] = ()
    missing: str | None = None
    name: str = ""
    parents: tuple[str, ...] = ()

    def __repr__(self) -> str:
        shape = ", ".join([*self.plates, *self.dims])
        given = f" | {', '.join(self.parents)}" if self.parents else ""
        return f"{self.name or self.kind}[{shape}]{given}"


def _names(value: str | tuple[str, ...] | list[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def latent(law: Law, plates: str | tuple[str, ...] = (), dims: str | tuple[str, ...] = ()) -> Variable:
    """A latent variable: one ground copy per combination of units of `plates`, each of event shape `dims`.

    Args:
        law: Callable returning a `torch.distributions.Distribution` for one ground unit; parameter names are parents.
        plates: Plate name or names; the order is the axis order.
        dims: Event dimension name or names.

    Example:
        >>> from torch.distributions import Normal
        >>> latent(lambda mu: Normal(mu, 1.0), plates="group").plates
        ('group',)
    """
    return Variable("latent", law, _names(plates), _names(dims))


def observed(law: Law, plates: str | tuple[str, ...] = (), dims: str | tuple[str, ...] = (), missing: str | None = None) -> Variable:
    """An observed variable; the cohort holds a variable of the same name.

    Args:
        law: As for `latent`.
        plates: As for `latent`.
        dims: As for `latent`.
        missing: "mask" if NaN means "not observed"; otherwise NaN is refused.
    """
    if missing not in (None, "mask"):
        raise ModelError("unknown treatment of missing observations", where="observed(missing=...)", expected="'mask' or None", got=repr(missing))
    return Variable("observed", law, _names(plates), _names(dims), missing)


def covariate(plates: str | tuple[str, ...] = (), dims: str | tuple[str, ...] = ()) -> Variable:
    """A known input of laws, read from the cohort variable of the same name."""
    return Variable("covariate", None, _names(plates), _names(dims))


class Model(Simulated, Drawn):
    """A hierarchical model with plates.

    log p(Theta, X) = sum over template variables i and ground units n of log p_i(theta_{i,n} | parents)
    (plate-enriched template graph of PAVI, arXiv 2308.16022, section 2).

    Args:
        *plates: The plates.
        sizes: Sizes of event dimensions that no store dimension supplies.
        **variables: Template variables, made by `latent`, `observed` and `covariate`.

    Raises:
        ModelError: Unknown plate or parent, cycle, parent on plates the child cannot reach, no law, discrete latent, reserved name.

    Example:
        >>> from torch.distributions import Normal
        >>> gre = Model(Plate("group"), Plate("obs", within="group"),
        ...             mu=latent(lambda: Normal(0.0, 1.0)),
        ...             theta=latent(lambda mu: Normal(mu, 0.5), plates="group"),
        ...             x=observed(lambda theta: Normal(theta, 1.0), plates="obs"))
        >>> gre.variables["theta"].parents
        ('mu',)
    """

    def __init__(self, /, *plates: Plate, sizes: Mapping[str, int] | None = None, **variables: Variable) -> None:
        if isinstance(sizes, Variable):  # meant as a variable of that name, which is refused below
            sizes, variables = None, {**variables, "sizes": sizes}
        self.plates: dict[str, Plate] = {}
        for plate in plates:
            if not isinstance(plate, Plate):
                raise ModelError("positional arguments of Model are plates", expected="Plate", got=type(plate).__name__)
            if plate.name in self.plates:
                raise ModelError("plate named twice", where=f"plate {plate.name!r}", remedy="give each plate its own name")
            self.plates[plate.name] = plate
        self.sizes = {name: _checked_size(name, size) for name, size in (sizes or {}).items()}
        named = {name: _bind(name, variable) for name, variable in variables.items()}
        _check_reserved(self.plates, named)
        _check_plates(self.plates)
        _check_variables(self.plates, named)
        self.variables: dict[str, Variable] = {name: named[name] for name in _topological(named)}

    def of_kind(self, *kinds: Kind) -> list[Variable]:
        """Variables of the given kinds, parents first."""
        return [v for v in self.variables.values() if v.kind in kinds]

    @property
    def latents(self) -> list[Variable]:
        """Latent variables, parents first."""
        return self.of_kind("latent")

    @property
    def dims(self) -> tuple[str, ...]:
        """All event dimensions, each once, in order of appearance."""
        return tuple(dict.fromkeys(d for v in self.variables.values() for d in v.dims))

    def fingerprint(self) -> str:
        """Digest of plates, variables and the code of the laws: equal models have equal fingerprints."""
        digest = hashlib.blake2b(digest_size=16)
        for plate in self.plates.values():
            digest.update(repr((plate.name, plate.within)).encode())
        digest.update(repr(sorted(self.sizes.items())).encode())
        for v in sorted(self.variables.values(), key=lambda v: v.name):
            digest.update(repr((v.name, v.kind, v.plates, v.dims, v.missing, v.parents)).encode())
            digest.update(_code_digest(v.law))
        return digest.hexdigest()

    def import_path(self) -> str | None:
        """`module:attribute` under which this very object can be imported, or None (a model local to a function)."""
        for name, module in list(sys.modules.items()):
            for attribute, value in list(getattr(module, "__dict__", {}).items()):
                if value is self and not attribute.startswith("_"):
                    return f"{name}:{attribute}"
        return None


def _bind(name: str, variable: Variable) -> Variable:
    if not isinstance(variable, Variable):
        raise ModelError(
            "keyword arguments of Model are variables",
            where=f"variable {name!r}",
            expected="latent(...), observed(...) or covariate(...)",
            got=type(variable).__name__,
        )
    if variable.law is None:
        parents: tuple[str, ...] = ()
    else:
        if not callable(variable.law):
            raise ModelError(
                "a law must be a callable", where=f"variable {name!r}", got=type(variable.law).__name__, remedy="wrap it: lambda: Normal(0.0, 1.0)"
            )
        parents = tuple(inspect.signature(variable.law).parameters)
    return Variable(variable.kind, variable.law, variable.plates, variable.dims, variable.missing, name, parents)


def _check_known(plates: Mapping[str, Plate], name: str, message: str, where: str) -> None:
    if name not in plates:
        raise ModelError(message, where=where, expected=f"one of {sorted(plates)}", got=repr(name), remedy=f"add Plate({name!r}) to the model")


def _check_plates(plates: Mapping[str, Plate]) -> None:
    for plate in plates.values():
        for parent in plate.within:
            _check_known(plates, parent, "plate lies within an unknown plate", f"plate {plate.name!r}")
    for name in plates:
        seen, todo = set(), list(plates[name].within)
        while todo:
            parent = todo.pop()
            if parent == name:
                raise ModelError("plates lie within each other in a cycle", where=f"plate {name!r}", remedy="remove one `within`")
            if parent not in seen:
                seen.add(parent)
                todo.extend(plates[parent].within)


def _checked_size(name: str, size: object) -> int:
    if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or size < 1:
        raise ModelError("a size is a positive integer", where=f"sizes[{name!r}]", got=repr(size)[:200])
    return int(size)


def _check_name(name: object, where: str) -> None:
    """Names become names of files and of parameters."""
    if not isinstance(name, str) or not name.isidentifier() or len(name.encode()) > LONGEST_NAME:
        expected = f"a Python identifier of at most {LONGEST_NAME} bytes"
        raise ModelError("a name is not usable", where=where, expected=expected, got=repr(name)[:200], remedy="rename it")


def _check_reserved(plates: Mapping[str, Plate], variables: Mapping[str, Variable]) -> None:
    """Refuse names that the posterior has a use for, all at once: a plate or event dimension is selected by its name, and lies beside those of draws."""
    axes = {**dict.fromkeys(plates, "plate"), **{d: "event dimension" for v in variables.values() for d in v.dims if d not in plates}}
    used = [f"{kind} {name!r}" for name, kind in axes.items() if name in {*OF_DRAWS, *OF_RESULTS, *OF_CALLS}]
    taken = {"latent": {*OF_DRAWS, *OF_RESULTS, *OF_MODEL}, "observed": {*OF_DRAWS, *OF_MODEL}, "covariate": {*OF_MODEL}}
    used += [f"variable {v.name!r}" for v in variables.values() if v.name in taken[v.kind]]
    if used:
        raise ModelError(
            "a name is reserved",
            where="Model",
            expected=f"plates and event dimensions other than {', '.join(sorted({*OF_DRAWS, *OF_RESULTS, *OF_CALLS}))}"
            f"; latents other than {', '.join(sorted(taken['latent']))}; observed variables other than {', '.join(sorted(taken['observed']))}"
            f"; covariates other than {', '.join(sorted(taken['covariate']))}",
            got=", ".join(used),
            remedy="rename it, in the cohort too (Dataset.rename)",
        )


def _check_variables(plates: Mapping[str, Plate], variables: Mapping[str, Variable]) -> None:
    for v in variables.values():
        where = f"variable {v.name!r}"
        for name in (v.name, *v.plates, *v.dims):
            _check_name(name, where)
        for plate in v.plates:
            _check_known(plates, plate, "variable lives on an unknown plate", where)
        if len(set(v.plates + v.dims)) != len(v.plates + v.dims) or set(v.dims) & set(plates):
            raise ModelError("a dimension is named twice, or is both a plate and an event dimension", where=where, got=f"plates {v.plates}, dims {v.dims}")
        if v.name in plates or v.name in v.dims:
            raise ModelError("a variable has the name of a plate or dimension", where=where, remedy="rename one of them")
        reachable = set(v.plates).union(*(ancestors(plates, p) for p in v.plates)) if v.plates else set()
        for parent in v.parents:
            if parent not in variables:
                raise ModelError(
                    "law has an unknown parent",
                    where=where,
                    expected=f"one of {sorted(set(variables) - {v.name})}",
                    got=repr(parent),
                    remedy="name a variable of the model, or fix the value inside the law",
                )
            if variables[parent].kind == "observed":
                raise ModelError(
                    "an observed variable cannot be a parent", where=f"{where}, parent {parent!r}", remedy="declare it as covariate(...) under another name"
                )
            for plate in variables[parent].plates:
                if plate not in reachable:
                    raise ModelError(
                        "parent lives on a plate that the variable cannot reach",
                        where=f"{where}, parent {parent!r}",
                        expected=f"plates among {sorted(reachable)}",
                        got=repr(plate),
                        remedy=f"put {v.name!r} on {plate!r}, or on a plate within it",
                    )


def _topological(variables: Mapping[str, Variable]) -> list[str]:
    order: list[str] = []
    state: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if state.get(name) == 2:
            return
        if state.get(name) == 1:
            cycle = " -> ".join([*path[path.index(name) :], name])
            raise ModelError("the model is cyclic", where=cycle, expected="a directed acyclic graph", remedy="remove one of these parents")
        state[name] = 1
        for parent in variables[name].parents:
            visit(parent, (*path, name))
        state[name] = 2
        order.append(name)

    for name in variables:
        visit(name, ())
    return order


def _code_digest(law: Law | None) -> bytes:
    """Digest of a callable's code: byte code, constants, names, defaults and captured plain values."""
    digest = hashlib.blake2b(digest_size=16)
    # One script is `__main__` where it fits, another module where it is imported, and a third where it is executed anew.
    own = getattr(law, "__module__", None), "__main__"

    def feed(value: Any) -> None:
        if isinstance(value, types.CodeType):
            digest.update(value.co_code)
            digest.update(repr(value.co_names).encode())
            for constant in value.co_consts:
                feed(constant)
        elif isinstance(value, types.FunctionType):
            feed(value.__code__)
            for default in value.__defaults__ or ():
                feed(default)
            for cell in value.__closure__ or ():
                feed(cell.cell_contents)
        elif isinstance(value, tuple) and not all(isinstance(v, PLAIN) for v in value):
            for each in value:  # of which the representation may tell an address
                feed(each)
        elif isinstance(value, (*PLAIN, tuple)):
            digest.update(repr(value).encode())
        else:
            kind = type(value)
            known = kind.__module__ not in own and not kind.__module__.startswith(ANEW)
            digest.update(f"{kind.__module__}.{kind.__qualname__}".encode() if known else kind.__qualname__.encode())

    feed(law)
    return digest.digest()

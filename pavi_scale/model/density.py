"""Log-densities of template laws on many ground units at once.

A law is written for one ground unit; nested `torch.func.vmap`, one per plate axis, carries it over all of them. A parent that
lacks a plate is not copied along it (`in_dims=None`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Geometric, MixtureSameFamily, Multinomial
from torch.distributions.constraints import Constraint

from pavi_scale.ambient import seeded
from pavi_scale.errors import ModelError
from pavi_scale.links import Link, make_link
from pavi_scale.model.promote import Promote
from pavi_scale.model.simulate.batched import LAW_ERRORS, expanded, unvalidated
from pavi_scale.model.supports import common
from pavi_scale.model.template import Model, Variable
from pavi_scale.plates import Selection, ancestors


@dataclass(frozen=True)
class Aligned:
    """A value carried to a variable's own ground units: `[K?, *axes, *event]`, `axes` a subset of the variable's plates in its order."""

    value: Tensor
    axes: tuple[str, ...]
    particles: bool

    def rows(self, rows: slice) -> Aligned:
        """Some units of the first axis; a view."""
        return Aligned(self.value[:, rows] if self.particles else self.value[rows], self.axes, self.particles)


def support_of(law: Distribution, where: str) -> Constraint:
    """Support of a law.

    Raises:
        ModelError: The law does not name one.
    """
    support = law.support
    if support is None:
        raise ModelError("law has no support", where=where, expected="torch.distributions.constraints.Constraint", got=type(law).__name__)
    return support


class Graph:
    """A model with known event sizes: links, shapes and vectorised log-densities.

    Args:
        model: The template model.
        event_sizes: Size of every event dimension.
        example: One ground unit's value of each covariate (ones where absent), used to look at the laws once.

    Raises:
        ModelError: A law fails, returns the wrong type, shape or support, or a latent is discrete.
    """

    def __init__(self, model: Model, event_sizes: Mapping[str, int], example: Mapping[str, Tensor] | None = None) -> None:
        self.model = model
        self.event_sizes = dict(event_sizes)
        self.links: dict[str, Link] = {}
        self.supports: dict[str, Constraint] = {}
        self.fillers: dict[str, Tensor] = {}  # what stands for missing observations: a draw of the law, so inside its support
        self.curved: dict[str, str] = {}  # variable -> the parent that its law gives second derivatives by (`SecondOrder`)
        self.labelled: dict[str, str] = {}  # observed mixture -> the parent that is the logits of its labels (`Labelled`)
        self.promote = False
        try:
            self._inspect(example or {})
        except (ModelError, RuntimeError) as error:
            if "dtype" not in str(error):
                raise
            self.promote = True  # a law captured single-precision tensors
            with Promote():
                self._inspect(example or {})

    def shape(self, v: Variable) -> tuple[int, ...]:
        """Event shape of one ground unit."""
        missing = [d for d in v.dims if d not in self.event_sizes]
        if missing:
            raise ModelError(
                "event dimension has no size",
                where=f"variable {v.name!r}, dim {missing[0]!r}",
                remedy=f"give Model(sizes={{{missing[0]!r}: ...}}), or store a variable that has the dimension",
            )
        return tuple(self.event_sizes[d] for d in v.dims)

    def _inspect(self, example: Mapping[str, Tensor]) -> None:
        values: dict[str, Tensor] = {}
        with seeded():
            for v in self.model.variables.values():
                if v.kind == "covariate":
                    values[v.name] = example.get(v.name, torch.ones(self.shape(v), dtype=torch.float64))
                    continue
                law = self.law(v, values)
                self.supports[v.name] = support_of(law, f"law of {v.name!r}")
                if v.missing == "mask":
                    self.fillers[v.name] = law.sample().to(torch.float64)
                if v.kind == "observed" and isinstance(law, SecondOrder):
                    passed = [p for p in v.parents if values[p] is law.curved and p in self.links and self.links[p].identity]
                    if passed:
                        self.curved[v.name] = passed[0]
                if v.kind == "observed" and v.missing != "mask" and law.event_shape == self.shape(v):
                    logits = [p for p in v.parents if self._labels(v, law, values, p)]
                    if logits:
                        self.labelled[v.name] = logits[0]
                if v.kind == "latent":
                    self.links[v.name] = make_link(self.supports[v.name], self.shape(v), v.name)
                    self._check_support(v, law, values)
                    values[v.name] = law.sample().to(torch.float64)
            for v in self.model.of_kind("observed"):
                self.supports[v.name] = self._fixed_support(v, values)
            for v in self.model.of_kind("latent", "observed"):
                self._check_many(v, values)

    def _fixed_support(self, v: Variable, values: Mapping[str, Tensor]) -> Constraint:
        """What the support is at other parents, too: a binomial's totals may be a covariate."""
        support = self.supports[v.name]
        for p in v.parents:
            link = self.links.get(p)
            for step in (1.0, -0.5):  # a probability has no room for the first
                with contextlib.suppress(ModelError):
                    moved = values[p] + step if link is None else link.forward(link.inverse(values[p]) + step)
                    support = common(support, support_of(self.law(v, {**values, p: moved}), f"law of {v.name!r}"))
        return support

    def _check_many(self, v: Variable, values: Mapping[str, Tensor]) -> None:
        """Refuse laws that only a single ground unit can be given to.

        Raises:
            ModelError: Under `torch.func.vmap` the law fails.
        """
        x = values[v.name] if v.name in values else self.law(v, values).sample()
        two = {n: Aligned(torch.stack([t, t]), (), True) for n, t in {v.name: x.to(torch.float64), **{p: values[p] for p in v.parents}}.items()}
        try:
            self.log_prob(v, two.pop(v.name), two)
        except LAW_ERRORS as error:
            if "dtype" in str(error) and not self.promote:
                raise  # promotion is tried next
            raise ModelError(
                "law cannot be computed on many ground units at once", where=f"law of {v.name!r}", expected="torch operations on its parents",
                got=" ".join(str(error).split())[:200], remedy="no float(), .item(), NumPy or branch on a parent's value: torch.where in place of if",
            ) from error

    def _labels(self, v: Variable, law: Distribution, values: Mapping[str, Tensor], parent: str) -> bool:
        """Whether a parent is the logits of a mixture's labels, and enters the law in no other way."""
        if parent not in self.links or not self.links[parent].identity or values[parent].ndim != 1:
            return False
        x = law.sample()
        moved = self.law(v, {**values, parent: values[parent].flip(0) + 0.5 * torch.arange(len(values[parent]))})
        for one, logits in ((law, values[parent]), (moved, values[parent].flip(0) + 0.5 * torch.arange(len(values[parent])))):
            evidence = evidence_of(one, x)
            if evidence is None or evidence.shape != logits.shape or not torch.allclose(evidence, torch.as_tensor(evidence_of(law, x)), rtol=1e-9):
                return False
            if not torch.allclose(one.log_prob(x), torch.logsumexp(logits + evidence, -1) - torch.logsumexp(logits, -1), rtol=1e-9):
                return False
        return True

    def law(self, v: Variable, values: Mapping[str, Tensor]) -> Distribution:
        """The law of one ground unit at given parent values, broadcast to the event shape."""
        where = f"law of {v.name!r}"
        if v.law is None:
            raise ModelError("variable has no law", where=where)
        try:
            law = v.law(**{p: values[p] for p in v.parents})
        except LAW_ERRORS as error:
            shapes = {p: tuple(values[p].shape) for p in v.parents}
            raise ModelError(
                "law fails on one ground unit",
                where=where,
                got=f"{type(error).__name__}: {error}",
                remedy=f"parents arrive with event shapes {shapes}, no plate axis",
            ) from error
        if not isinstance(law, Distribution):
            raise ModelError("law does not return a distribution", where=where, expected="torch.distributions.Distribution", got=type(law).__name__)
        return expanded(law, self.shape(v), where)

    def _check_support(self, v: Variable, law: Distribution, values: Mapping[str, Tensor]) -> None:
        """Refuse supports that move with the parents: the link must be one fixed bijection."""
        probe = torch.full(self.links[v.name].base_shape, 0.3, dtype=torch.float64)
        theta = self.links[v.name].forward(probe)
        for p in v.parents:
            moved = {**values, p: values[p] * 0.5 if self.model.variables[p].kind == "latent" else values[p] + 1.0}
            try:
                with unvalidated():
                    other = make_link(support_of(self.law(v, moved), v.name), self.shape(v), v.name).forward(probe)
            except ModelError:
                continue  # the moved parent left its own support; nothing to learn from it
            if not torch.allclose(theta, other, rtol=1e-9, atol=1e-12):
                raise ModelError(
                    "support of a latent depends on its parent",
                    where=f"latent {v.name!r}, parent {p!r}",
                    expected="a fixed support",
                    remedy="write the latent on a fixed support and scale it where it is used",
                )

    def log_prob(self, v: Variable, value: Aligned, parents: Mapping[str, Aligned], mask: Aligned | None = None) -> Tensor:
        """log p(value | parents) of each ground unit, `[K, *plates]` (K = 1 if nothing has particles)."""
        shape = self.shape(v)
        where = f"law of {v.name!r}"
        law_of = v.law
        if law_of is None:
            raise ModelError("variable has no law", where=where)
        names = list(parents)

        def unit(x: Tensor, keep: Tensor | None, *given: Tensor) -> Tensor:
            law = expanded(law_of(**dict(zip(names, given, strict=True))), shape, where)
            out = log_prob_of(law, x)
            if keep is not None:  # a law with event dimensions of its own counts only where all of them are observed
                out = out * (keep.flatten(out.ndim).amin(-1) if keep.ndim > out.ndim else keep)
            return out.sum()

        return _over_units(unit, v.plates, [value, mask, *parents.values()], self.promote, ())[0]

    def second_order(self, v: Variable, value: Aligned, parents: Mapping[str, Aligned]) -> tuple[Tensor, Tensor, Tensor]:
        """Log p(value | parents) of each ground unit, with gradient and minus Hessian by the parent `curved[v.name]`, from the law's own formula.

        Returns:
            `[K, *plates]`, `[K, *plates, e]`, `[K, *plates, e, e]`; K and plates may be 1 where nothing varies along them.
        """
        law_of, names, shape = v.law, list(parents), self.shape(v)

        def unit(x: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
            law = expanded(law_of(**dict(zip(names, given, strict=True))), shape, v.name)  # type: ignore[misc]
            return law.second_order(x)  # type: ignore[attr-defined,no-any-return]

        value_, gradient, hessian = _over_units(unit, v.plates, [value, *parents.values()], self.promote, ())
        return value_, gradient, hessian

    def evidence(self, v: Variable, value: Aligned, parents: Mapping[str, Aligned]) -> Tensor:
        """Log p(value | label, parents) of each ground unit of a variable in `labelled`, `[K, *plates, labels]`."""
        law_of, names, shape = v.law, list(parents), self.shape(v)

        def unit(x: Tensor, *given: Tensor) -> Tensor:
            law = expanded(law_of(**dict(zip(names, given, strict=True))), shape, v.name)  # type: ignore[misc]
            return evidence_of(law, x)  # type: ignore[return-value]

        labels = self.links[self.labelled[v.name]].size
        return _over_units(unit, v.plates, [value, *parents.values()], self.promote, (labels,))[0]

    def prior_mean(self, v: Variable, parents: Mapping[str, Aligned]) -> Tensor:
        """Unconstrained image of the conditional prior's mean, `[K, *plates, *base_shape]`; zero where it has none."""
        shape, link, law_of = self.shape(v), self.links[v.name], v.law
        names = list(parents)
        if law_of is None:
            raise ModelError("variable has no law", where=f"law of {v.name!r}")

        def unit(*given: Tensor) -> Tensor:
            law = expanded(law_of(**dict(zip(names, given, strict=True))), shape, v.name)
            try:
                return law.mean + torch.zeros(shape, dtype=law.mean.dtype)
            except NotImplementedError:
                return torch.full(shape, math.nan)

        z = link.inverse(_over_units(unit, v.plates, list(parents.values()), self.promote, shape)[0])
        return torch.nan_to_num(z, nan=0.0, posinf=0.0, neginf=0.0)


@runtime_checkable
class SecondOrder(Protocol):
    """A law that gives its own second derivatives by one of its parameters: several times as fast as automatic differentiation.

    Any `torch.distributions.Distribution` may have these two; they are used where a model's law passes a latent on as that parameter.
    """

    @property
    def curved(self) -> Tensor:
        """The parameter, `[e]`, the very tensor that the law was made with."""
        ...

    def second_order(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-density, gradient `[e]`, minus Hessian `[e, e]`."""
        ...


@runtime_checkable
class Labelled(Protocol):
    """A mixture that gives the log-density of a value under each of its components: its labels are then summed out in closed form."""

    def evidence(self, value: Tensor) -> Tensor:
        """Log p(value | label), `[labels]`."""
        ...


def evidence_of(law: Distribution, x: Tensor) -> Tensor | None:
    """Log-density of x under each component of a mixture; None if the law is none."""
    if isinstance(law, Labelled):
        return law.evidence(x)
    if isinstance(law, MixtureSameFamily) and isinstance(law.mixture_distribution, Categorical):
        return law.component_distribution.log_prob(x.unsqueeze(-1 - len(law.event_shape)))
    return None


def _over_units(
    unit: Callable[..., Tensor | tuple[Tensor, ...]], plates: tuple[str, ...], inputs: list[Aligned | None], promote: bool, event: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """Nested vmap of `unit` over the particle axis and the plates; inputs that are None pass as None.

    An input's axes are consumed from the left, so the outermost map is the particle axis. Axes of one unit are dropped, not mapped over: that costs
    as much as the law itself.
    """
    present = [a for a in inputs if a is not None]
    lengths = [(p, a.value.shape[int(a.particles) + i]) for a in present for i, p in enumerate(a.axes)]
    sizes = {p: 0 if any(n == 0 for q, n in lengths if q == p) else max(n for q, n in lengths if q == p) for p, _ in lengths}
    lead = max((len(a.value) for a in present if a.particles), default=1)
    if 0 in sizes.values():  # a county without houses: vmap cannot run over no units, and there is nothing to compute
        tie = sum((0.0 * a.value.sum() for a in present if a.value.requires_grad), present[0].value.new_zeros(()))
        return (present[0].value.new_zeros(lead, *(sizes.get(p, 1) for p in plates), *event) + tie,)
    mapped = [p for p in plates if sizes.get(p, 1) > 1]
    function = unit
    for plate in reversed(mapped):
        function = torch.func.vmap(function, in_dims=tuple(0 if a is not None and plate in a.axes else None for a in inputs))
    if lead > 1:
        function = torch.func.vmap(function, in_dims=tuple(0 if a is not None and a.particles else None for a in inputs))
    with unvalidated(), Promote() if promote else contextlib.nullcontext():
        found = function(*(None if a is None else _without_single_axes(a, lead, mapped) for a in inputs))
    outs = []
    for out in found if isinstance(found, tuple) else (found,):
        whole = out if lead > 1 else out.unsqueeze(0)
        for depth, plate in enumerate(plates, start=1):
            whole = whole if plate in mapped else whole.unsqueeze(depth)
        outs.append(whole)
    return tuple(outs)


def _without_single_axes(a: Aligned, lead: int, mapped: list[str]) -> Tensor:
    """The value with the axes that are mapped over, and the event's."""
    first = int(a.particles)
    dropped = [first + i for i, p in enumerate(a.axes) if p not in mapped] + ([0] if first and lead == 1 else [])
    return a.value.squeeze(dropped) if dropped else a.value


def log_prob_of(law: Distribution, x: Tensor) -> Tensor:
    """`law.log_prob(x)`, also for the laws whose torch implementation cannot run under vmap."""
    if isinstance(law, Multinomial):  # it assigns by a boolean mask
        return torch.lgamma(x.sum(-1) + 1) - torch.lgamma(x + 1).sum(-1) + torch.xlogy(x, law.probs).sum(-1)
    if isinstance(law, Geometric):  # it writes into an unbatched tensor
        return torch.special.xlog1py(x, -law.probs) + law.probs.log()
    return law.log_prob(x)


def align(value: Tensor, particles: bool, own: tuple[str, ...], target: tuple[str, ...], selection: Selection) -> Aligned:
    """Carry `value`, on plates `own`, to the ground units of a variable on plates `target`.

    Plates that `target` has too stay axes; any other is an ancestor of one of the target's plates and is gathered along it.
    """
    plates = selection.layout.plates
    lead = int(particles)
    goes_to = {p: p if p in target else next(t for t in target if p in ancestors(plates, t)) for p in own}
    axes = tuple(t for t in target if t in goes_to.values())
    if all(p == t for p, t in goes_to.items()):
        order = [own.index(t) for t in axes]
        if order != sorted(order):
            trailing = range(lead + len(own), value.ndim)
            value = value.permute(*range(lead), *(lead + i for i in order), *trailing)
        return Aligned(value, axes, particles)
    gathered = [p for p in own if goes_to[p] != p]
    if len(own) == 1:
        index = torch.from_numpy(selection.path(goes_to[own[0]], own[0])).to(value.device)
        return Aligned(value.index_select(lead, index), axes, particles)
    positions = []
    for p in own:
        t = goes_to[p]
        index = torch.from_numpy(selection.path(t, p)) if p in gathered else torch.arange(value.shape[lead + own.index(p)])
        positions.append(index.to(value.device).reshape([-1 if a == t else 1 for a in axes]))
    full = (slice(None),) * lead + tuple(positions)
    return Aligned(value[full], axes, particles)

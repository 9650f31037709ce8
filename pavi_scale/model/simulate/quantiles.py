"""Draws from a law as a function of uniform numbers: the same uniforms, the same draws, whatever else is drawn with them.

x = F^{-1}(u), coordinate by coordinate; mixtures choose their component by a uniform of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from scipy import special
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Distribution,
    Gamma,
    Geometric,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    NegativeBinomial,
    Poisson,
    StudentT,
    TransformedDistribution,
)

# (name of the uniforms, shape) -> uniform numbers in (0, 1) of that shape, float64
Uniforms = Callable[[str, torch.Size], Tensor]


class NoQuantileError(Exception):
    """The law cannot be drawn from as a function of uniforms."""


def _scipy(function: Callable[..., object], *arguments: Tensor) -> Tensor:
    return torch.as_tensor(function(*(a.double().numpy() for a in arguments)), dtype=torch.float64)


def _counts(name: str, *arguments: Tensor) -> Tensor:
    # scipy.stats takes most of a second to import, which only laws of counts need.
    return _scipy(getattr(importlib.import_module("scipy.stats"), name).ppf, *arguments)


_QUANTILES: dict[type[Distribution], Callable[..., Tensor]] = {
    Bernoulli: lambda law, u: (u > 1 - law.probs).double(),
    Poisson: lambda law, u: _counts("poisson", u, law.rate),
    Binomial: lambda law, u: _counts("binom", u, law.total_count, law.probs),
    NegativeBinomial: lambda law, u: _counts("nbinom", u, law.total_count, 1 - law.probs),
    Geometric: lambda law, u: torch.floor(torch.log1p(-u) / torch.log1p(-law.probs)),
    Gamma: lambda law, u: _scipy(special.gammaincinv, law.concentration, u) / law.rate,
    Beta: lambda law, u: _scipy(special.betaincinv, law.concentration1, law.concentration0, u),
    StudentT: lambda law, u: law.loc + law.scale * _scipy(special.stdtrit, law.df, u),
}


def draw_by_quantiles(law: Distribution, uniforms: Uniforms, path: str = "") -> Tensor:
    """One draw of every element of a law, `[*batch_shape, *event_shape]`.

    Args:
        law: The law.
        uniforms: Source of uniform numbers.
        path: Name of the law within a larger one.

    Raises:
        NoQuantileError: The law has no quantile function here.

    Example:
        >>> from torch.distributions import Normal
        >>> draw_by_quantiles(Normal(1.0, 2.0), lambda path, shape: torch.full(shape, 0.5)).item()
        1.0
    """
    if isinstance(law, Independent):
        return draw_by_quantiles(law.base_dist, uniforms, path)
    if isinstance(law, MixtureSameFamily):
        depth, event = len(law.batch_shape), law.event_shape
        which = draw_by_quantiles(law.mixture_distribution, uniforms, path + "/which").long()
        parts = draw_by_quantiles(law.component_distribution, uniforms, path + "/component")
        return parts.gather(depth, which.reshape(*which.shape, 1, *(1 for _ in event)).expand(*which.shape, 1, *event)).squeeze(depth)
    if isinstance(law, MultivariateNormal):
        z = torch.special.ndtri(uniforms(path, law.batch_shape + law.event_shape))
        return law.loc + (law.scale_tril @ z.to(law.loc.dtype)[..., None])[..., 0]
    if isinstance(law, TransformedDistribution):
        value = draw_by_quantiles(law.base_dist, uniforms, path)
        for transform in law.transforms:
            value = transform(value)
        return value
    if isinstance(law, Categorical):
        u = uniforms(path, law.batch_shape)
        return (u[..., None] > law.probs.cumsum(-1)[..., :-1]).sum(-1).double()
    u = uniforms(path, law.batch_shape + law.event_shape)
    found = next((function for kind, function in _QUANTILES.items() if isinstance(law, kind)), None)
    if found is not None:
        return found(law, u)
    try:
        return law.icdf(u)
    except NotImplementedError:
        raise NoQuantileError from None

r"""Squared distances of many points to a few centres, and their gradient by the centres, in compiled loops.

.. math:: s_{kn} = \sum_d (x_{nd} - m_{kd})^2, \qquad \frac{\partial}{\partial m_{kd}} \sum_{kn} g_{kn} s_{kn} = -2 \sum_n g_{kn} (x_{nd} - m_{kd})

A matrix product with so few centres leaves a processor's vector units idle and needs |x|^2 and |m|^2 beside it, in passes of their own over memory. Here
points are read once for all centres and particles, some at a time into the fastest cache, with vector instructions that run over points. Differences are
squared, not expanded, so that nothing is lost far from the origin. Products are fused by name and nothing is reordered: the bits do not depend on where
in memory a point lies, nor on whether the code was compiled in the process or loaded from the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from pavi_scale.instructions import fma

LANES = 128  # points at once
STEP = 4  # coordinates that are summed up between two visits of a sum in memory
TOGETHER = 16  # points of which a gradient is summed up between two such visits


@njit(nogil=True, error_model="numpy", cache=True)  # type: ignore[misc]
def _squares(x: Any, m: Any, out: Any) -> None:
    """out[k, r, l, n] <- |x[r, n] - m[k, r, l]|^2, float32; x `[R, N, D]`, m `[K, R, L, D]`."""
    particles, rows, centres, dim = m.shape
    points, whole = x.shape[1], dim - dim % STEP
    column = np.empty((dim, LANES), np.float32)
    total = np.empty(LANES, np.float32)
    for r in range(rows):
        for at in range(0, points, LANES):
            width = min(LANES, points - at)
            block = x[r, at : at + width]
            for u in range(width):
                own = block[u]
                for d in range(dim):
                    column[d, u] = own[d]
            for k in range(particles):
                for l in range(centres):  # noqa: E741
                    for u in range(LANES):
                        total[u] = np.float32(0.0)
                    for d in range(0, whole, STEP):
                        some, centre = column[d : d + STEP], m[k, r, l, d : d + STEP]
                        for u in range(LANES):
                            t = total[u]
                            for j in range(STEP):
                                away = some[j, u] - centre[j]
                                t = fma(away, away, t)
                            total[u] = t
                    for d in range(whole, dim):
                        middle = m[k, r, l, d]
                        for u in range(LANES):
                            away = column[d, u] - middle
                            total[u] = fma(away, away, total[u])
                    out[k, r, l, at : at + width] = total[:width]


@njit(nogil=True, error_model="numpy", cache=True)  # type: ignore[misc]
def _pull(x: Any, m: Any, g: Any, out: Any) -> None:
    """out[k, r, l, d] <- sum_n g[k, r, l, n] (x[r, n, d] - m[k, r, l, d]), float32."""
    particles, rows, centres, points = g.shape
    dim, whole = x.shape[2], points - points % TOGETHER
    out[...] = np.float32(0.0)
    for r in range(rows):
        for at in range(0, whole, TOGETHER):
            some = x[r, at : at + TOGETHER]
            for k in range(particles):
                for l in range(centres):  # noqa: E741
                    total, weight, centre = out[k, r, l], g[k, r, l, at : at + TOGETHER], m[k, r, l]
                    for d in range(dim):
                        t = total[d]
                        for j in range(TOGETHER):
                            t = fma(weight[j], some[j, d] - centre[d], t)
                        total[d] = t
        for n in range(whole, points):
            for k in range(particles):
                for l in range(centres):  # noqa: E741
                    for d in range(dim):
                        out[k, r, l, d] = fma(g[k, r, l, n], x[r, n, d] - m[k, r, l, d], out[k, r, l, d])


def _in_rows(x: Tensor, m: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
    """Points `[R, N, D]` and centres `[K, R, L, D]`, contiguous, of broadcast leading axes, the first of which is K where the points do not have it."""
    lead = torch.Size(np.broadcast_shapes(x.shape[:-2], m.shape[:-2]))
    points = x.reshape((1,) * (len(lead) + 2 - x.ndim) + x.shape)
    shared = bool(lead) and points.shape[0] == 1
    inner = lead[1:] if shared else lead
    points = (points[0] if shared else points).expand(*inner, *x.shape[-2:]).reshape(-1, *x.shape[-2:])
    centres = m.expand(*lead, *m.shape[-2:]).reshape(lead[0] if shared else 1, -1, *m.shape[-2:])
    return points.contiguous(), centres.contiguous(), lead


class _Squares(torch.autograd.Function):
    """`squares` of points that share their centres: `[*, N, D]`, `[*, L, D]` -> `[*, L, N]`, leading axes broadcast; single precision, on the processor."""

    @staticmethod
    def forward(x: Tensor, m: Tensor) -> Tensor:
        """The distances."""
        points, centres, lead = _in_rows(x.detach(), m.detach())
        out = torch.empty(*centres.shape[:3], points.shape[1])
        _squares(points.numpy(), centres.numpy(), out.numpy())
        return out.reshape(*lead, m.shape[-2], x.shape[-2])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Points and centres are what the gradient needs."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gradients by points and centres."""
        (g,) = grads
        x, m = ctx.saved_tensors
        by_x = by_m = None
        if ctx.needs_input_grad[0]:
            by_x = (2 * (x * g.sum(-2).unsqueeze(-1) - g.mT @ m)).sum_to_size(x.shape)
        if ctx.needs_input_grad[1]:
            points, centres, lead = _in_rows(x.detach(), m.detach())
            out = torch.empty_like(centres)
            _pull(points.numpy(), centres.numpy(), g.reshape(*centres.shape[:3], points.shape[1]).contiguous().numpy(), out.numpy())
            by_m = (-2 * out).reshape(*lead, *m.shape[-2:]).sum_to_size(m.shape)
        return by_x, by_m

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], x: Tensor, m: Tensor) -> tuple[Tensor, int]:
        """Points mapped over alone are more points of the same centres; whatever else is mapped over becomes a leading axis."""
        of_x, of_m = in_dims
        if of_m is None and of_x is not None:
            many = x.movedim(of_x, -3)
            out = _Squares.apply(many.flatten(-3, -2), m).unflatten(-1, many.shape[-3:-1])  # type: ignore[no-untyped-call]
            return out, out.ndim - 2
        x, m = (t.unsqueeze(0) if at is None else t.movedim(at, 0) for t, at in ((x, of_x), (m, of_m)))
        depth = max(x.ndim, m.ndim)
        x, m = (t.reshape(t.shape[0], *(1,) * (depth - t.ndim), *t.shape[1:]) for t in (x, m))
        return _Squares.apply(x, m), 0  # type: ignore[no-untyped-call]


def squares(x: Tensor, m: Tensor) -> Tensor:
    """Squared distances of a point `[D]` to centres `[L, D]`, `[L]`: float32, on the processor.

    Under `torch.func.vmap` over many points, all of them are computed by one call, and lie beside each other in memory: as `[L, N]`. Differentiable
    once.

    Example:
        >>> squares(torch.tensor([1.0, 2.0]), torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
        tensor([5., 4.])
    """
    out: Tensor = _Squares.apply(x.unsqueeze(-2), m)  # type: ignore[no-untyped-call]
    return out.squeeze(-1)

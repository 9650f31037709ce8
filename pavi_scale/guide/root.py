"""The root block: the joint distribution of the variables that live on no plate, in unconstrained coordinates."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor

from pavi_scale.ambient import seeded
from pavi_scale.model.density import Graph
from pavi_scale.reduced import Reduced, Value


class RootSpace:
    """Coordinates of the root variables.

    Args:
        graph: The model with its links.
        reduced: Any reduced model of the cohort; its plateless data are read by root laws.
    """

    def __init__(self, graph: Graph, reduced: Reduced) -> None:
        self.graph, self.reduced = graph, reduced
        self.names = tuple(v.name for v in graph.model.latents if not v.plates)
        self.sizes = tuple(graph.links[n].size for n in self.names)
        self.dim = sum(self.sizes)

    def values(self, z: Tensor) -> dict[str, Value]:
        """Constrained values of `z` `[K, R]`."""
        out = {}
        for name, part in zip(self.names, z.split(self.sizes, -1), strict=True):
            link = self.graph.links[name]
            out[name] = Value(link.forward(part.reshape(-1, *link.base_shape)), ())
        return out

    def log_prior(self, z: Tensor, without: Collection[str] = ()) -> Tensor:
        """log p(root) in unconstrained coordinates, `[K]`; some laws left out."""
        values = self.values(z)
        total = torch.zeros(len(z), dtype=z.dtype)
        for name, part in zip(self.names, z.split(self.sizes, -1), strict=True):
            if name in without:
                continue
            link = self.graph.links[name]
            base = part.reshape(-1, *link.base_shape)
            total = total + self.reduced.log_prob(name, values) + link.log_det(base, values[name].theta)
        return total

    def prior_draws(self, count: int, seed: int) -> np.ndarray:
        """Draws of the prior in unconstrained coordinates, `[count, R]`."""
        rows = []
        with seeded(seed):
            for _ in range(count):
                theta: dict[str, Tensor] = {}
                flat = []
                for name in self.names:
                    v = self.graph.model.variables[name]
                    data = {p: self.reduced.data[p] for p in v.parents if p in self.reduced.data}
                    theta[name] = self.graph.law(v, {**theta, **data}).sample().to(torch.float64)
                    flat.append(self.graph.links[name].inverse(theta[name]).flatten())
                rows.append(torch.cat(flat) if flat else torch.zeros(0, dtype=torch.float64))
        return torch.nan_to_num(torch.stack(rows), nan=0.0, posinf=30.0, neginf=-30.0).clamp(-1e100, 1e100).numpy()  # whose squares are finite, too

    def pack(self, theta: Mapping[str, np.ndarray]) -> np.ndarray:
        """Unconstrained coordinates of one set of constrained values."""
        return np.concatenate([self.graph.links[n].inverse(torch.as_tensor(theta[n], dtype=torch.float64)).flatten().numpy() for n in self.names])

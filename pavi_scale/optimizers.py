"""Adam over named arrays and over single rows of tables: state in, state out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Adam:
    """Adam (Kingma & Ba 2015), maximising; rows of a table keep their own step counts, so that seldom seen rows are corrected rightly.

    Args:
        rate: Step size before `scale`.
        scale: Name -> multiplier of the step size (array or number): steps are then in units of the parameter's own spread.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        first: First moments by name.
        second: Second moments by name.
        count: Step counts by name (per row for tables).
    """

    rate: float = 0.05
    scale: Mapping[str, np.ndarray | float] = field(default_factory=dict)
    beta1: float = 0.9
    beta2: float = 0.99
    first: dict[str, np.ndarray] = field(default_factory=dict)
    second: dict[str, np.ndarray] = field(default_factory=dict)
    count: dict[str, np.ndarray] = field(default_factory=dict)

    def update(self, name: str, value: np.ndarray, gradient: np.ndarray, rows: np.ndarray | None = None) -> None:
        """One ascent step on `value`, in place.

        Args:
            name: Name of the parameter.
            value: The parameter; a table `[n, d]` if `rows` is given.
            gradient: Gradient of the objective, of the value's shape (or of the rows' shape).
            rows: Positions of the rows that the gradient is for, each once.
        """
        if name not in self.first:
            self.first[name], self.second[name] = np.zeros_like(value), np.zeros_like(value)
            self.count[name] = np.zeros(len(value) if rows is not None else (), dtype=np.int64)
        at = slice(None) if rows is None else rows
        if rows is None:
            self.count[name] = self.count[name] + 1
            steps = self.count[name].astype(np.float64)
        else:
            self.count[name][rows] += 1
            steps = self.count[name][rows].astype(np.float64).reshape(-1, *([1] * (value.ndim - 1)))
        first = self.beta1 * self.first[name][at] + (1 - self.beta1) * gradient
        second = self.beta2 * self.second[name][at] + (1 - self.beta2) * gradient * gradient
        self.first[name][at], self.second[name][at] = first, second
        step = first / (1 - self.beta1**steps) / (np.sqrt(second / (1 - self.beta2**steps)) + 1e-8)
        value[at] = value[at] + self.rate * np.asarray(self.scale.get(name, 1.0)) * step

    def arrays(self) -> dict[str, np.ndarray]:
        """All state as named arrays."""
        groups = {"first": self.first, "second": self.second, "count": self.count}
        return {f"adam/{kind}/{name}": np.asarray(value) for kind, group in groups.items() for name, value in group.items()}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take back what `arrays` gave."""
        groups = {"first": self.first, "second": self.second, "count": self.count}
        for key, value in arrays.items():
            if key.startswith("adam/"):
                _, kind, name = key.split("/", 2)
                groups[kind][name] = value.copy()

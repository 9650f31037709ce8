"""What simulation and drawing need of a model: structural types, so that `Model` can call them without an import cycle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch.distributions import Distribution

from pavi_scale.plates import Plate


class VariableLike(Protocol):
    """A bound template variable (`template.Variable`)."""

    @property
    def name(self) -> str:
        """Its name in the model."""

    @property
    def kind(self) -> str:
        """One of "latent", "observed" or "covariate"."""

    @property
    def law(self) -> Callable[..., Distribution] | None:
        """Law of one ground unit; None for a covariate."""

    @property
    def plates(self) -> tuple[str, ...]:
        """Its plates, in axis order."""

    @property
    def dims(self) -> tuple[str, ...]:
        """Its event dimensions, after the plates."""

    @property
    def parents(self) -> tuple[str, ...]:
        """Names of its law's parameters."""


class ModelLike(Protocol):
    """A template graph (`template.Model`); `variables` are parents first."""

    @property
    def plates(self) -> Mapping[str, Plate]:
        """The plates by name."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Fixed sizes of event dimensions."""

    @property
    def variables(self) -> Mapping[str, VariableLike]:
        """The variables by name, parents first."""

    @property
    def dims(self) -> tuple[str, ...]:
        """All event dimensions."""

    def fingerprint(self) -> str:
        """Digest of structure and laws."""

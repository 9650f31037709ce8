"""What is imported when it is first used: a short command and a worker that starts anew need few of the modules which the package can use."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Later:
    """A module, or what a module holds, under the name that it would be imported as.

    Type checkers, and the rules on imports, are told by an `import` under `TYPE_CHECKING`, of which this is the other branch.

    Args:
        name: A module's dotted name, or `module:attribute`.

    Example:
        >>> fractions, gcd = Later("fractions"), Later("math:gcd")
        >>> fractions.Fraction(1, 2), gcd(4, 6)
        (Fraction(1, 2), 2)
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def _found(self) -> Any:
        module, _, attribute = self._name.partition(":")
        found = import_module(module)
        return getattr(found, attribute) if attribute else found

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._found(), attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return self._found()(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Later({self._name!r})"

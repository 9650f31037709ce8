"""Every exception of the package: what is wrong, where, expected, got, remedy."""

from __future__ import annotations


class PaviError(Exception):
    """Base of all errors that the package raises on purpose.

    Args:
        what: One sentence that says what is wrong.
        where: The place: a variable, a plate, a file, a study key.
        expected: What would have been right.
        got: What was found instead.
        remedy: What the user can do about it.

    Example:
        >>> print(PaviError("plate is empty", where="plate 'school'", got="cardinality 0", remedy="drop it"))
        plate is empty; where: plate 'school'; got: cardinality 0; remedy: drop it
    """

    exit_code = 1

    def __init__(self, what: str, *, where: object = None, expected: object = None, got: object = None, remedy: object = None) -> None:
        self.what, self.where, self.expected, self.got, self.remedy = what, where, expected, got, remedy
        parts = [("where", where), ("expected", expected), ("got", got), ("remedy", remedy)]
        super().__init__("; ".join([what, *(f"{name}: {value}" for name, value in parts if value is not None)]))

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only fields would be lost by the default protocol when an error crosses from a worker process.
        return _rebuild, (type(self), self.what, self.where, self.expected, self.got, self.remedy)


def _rebuild(cls: type[PaviError], what: str, where: object, expected: object, got: object, remedy: object) -> PaviError:
    return cls(what, where=where, expected=expected, got=got, remedy=remedy)


class InputError(PaviError, ValueError):
    """Bad input; found before any compute."""

    exit_code = 2


class ModelError(InputError):
    """The model is ill-formed: unknown parent, cycle, discrete latent, wrong shape or support of a law."""


class CohortError(InputError):
    """The cohort does not fit the model, or cannot be read."""


class StudyError(InputError):
    """A study file or option is wrong."""


class RunError(InputError):
    """A run directory cannot be written, read or resumed."""


class PlanRefused(PaviError):
    """The plan does not fit the memory or disk that was allowed."""

    exit_code = 3


class Interrupted(PaviError):
    """The run was interrupted and can be resumed."""

    exit_code = 75


class NumericalError(PaviError):
    """A loss, gradient or posterior value is not finite."""


class WorkerError(PaviError):
    """A worker failed or was lost and its work could not be placed elsewhere."""


class ClusterLost(WorkerError):
    """No worker is left, or the scheduler is gone; with the cluster back, the run goes on where it stopped."""

    exit_code = 75

"""The engine for one process: no cluster, the process's cores share the tasks of a round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from pavi_scale.errors import PaviError, WorkerError
from pavi_scale.server.answer import align_all, answer, settle_threads, torch_threads
from pavi_scale.server.protocol import Asked, Computation, Spec


@dataclass(frozen=True, slots=True)
class Begun:
    """A round that the pool works on."""

    futures: list[Future[dict[str, np.ndarray]]]

    def result(self) -> list[dict[str, np.ndarray]]:
        """Its answers, in task order."""
        return list(self)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Its answers, in task order; none is kept."""
        self.futures.reverse()
        try:
            while self.futures:
                yield self.futures.pop().result()
        except CancelledError as error:
            raise WorkerError("the engine was closed during a round", where="LocalEngine") from error
        finally:
            for f in self.futures:  # nothing of a failed or interrupted round is begun any more
                f.cancel()


@dataclass(frozen=True, slots=True)
class Done:
    """A round that was answered when it was asked for."""

    answers: list[dict[str, np.ndarray]]

    def result(self) -> list[dict[str, np.ndarray]]:
        """Its answers, in task order."""
        return self.answers

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Its answers, in task order."""
        return iter(self.answers)


class LocalEngine:
    """Answers rounds in this process.

    Args:
        spec: The computation; built at once, on this thread.
        lanes: Tasks at the same time. Which thread answers a task does not enter its answer.

    Raises:
        PaviError: From `spec.build()`.

    Example:
        >>> class Double:
        ...     def build(self): return self
        ...     def compute(self, kind, state, task): return {"y": state["x"] * task["by"]}
        >>> with LocalEngine(Double()) as engine:
        ...     [r["y"].tolist() for r in engine.round("scale", {"x": np.arange(2.0)}, [{"by": 2}, {"by": 3}])]
        [[0.0, 2.0], [0.0, 3.0]]
    """

    def __init__(self, spec: Spec, lanes: int = 1) -> None:
        self._threads: int | None = getattr(spec, "threads", None)
        self._lanes = max(1, lanes)
        with torch_threads(self._threads):
            self._computation: Computation | None = spec.build()
        self._pool = ThreadPoolExecutor(self._lanes, "pavi-lane", initializer=settle_threads, initargs=(self._threads,)) if self._lanes > 1 else None

    @property
    def parallelism(self) -> int:
        """Tasks that run at the same time."""
        return self._lanes

    @property
    def processes(self) -> int:
        """Computations, each with memory of its own."""
        return 1

    def round(self, kind: str, state: Mapping[str, np.ndarray], tasks: Sequence[Mapping[str, Any]]) -> list[dict[str, np.ndarray]]:
        """The answers to `tasks`, in their order.

        Args:
            kind: What is asked.
            state: Named arrays that all tasks share.
            tasks: One mapping per task.

        Raises:
            PaviError: As raised by the computation, of the first task that failed.
            WorkerError: The computation raised anything else (chained), or the engine is closed.
        """
        return self.submit(kind, state, tasks).result()

    def submit(self, kind: str, state: Mapping[str, np.ndarray], tasks: Sequence[Mapping[str, Any]]) -> Asked:
        """Ask, and wait later; with one lane the answers are there at once. Arguments and errors as those of `round`."""
        if self._pool is None or self._computation is None:
            return Done(list(self._here(kind, state, tasks)))
        arrays = align_all(state)
        return Begun([self._pool.submit(self._one, kind, arrays, task, index) for index, task in enumerate(tasks)])

    def stream(self, kind: str, state: Mapping[str, np.ndarray], tasks: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, np.ndarray]]:
        """The answers one by one, in task order; with one lane each is computed when it is asked for. Arguments and errors as those of `round`."""
        return self._here(kind, state, tasks) if self._pool is None else iter(self.submit(kind, state, tasks))

    def _here(self, kind: str, state: Mapping[str, np.ndarray], tasks: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, np.ndarray]]:
        if self._computation is None:
            raise WorkerError("the engine is closed", where="LocalEngine.round", remedy="make a new one")
        arrays = align_all(state)
        for index, task in enumerate(tasks):
            with torch_threads(self._threads):
                found = self._one(kind, arrays, task, index)
            yield found

    def _one(self, kind: str, arrays: Mapping[str, np.ndarray], task: Mapping[str, Any], index: int) -> dict[str, np.ndarray]:
        if self._computation is None:
            raise WorkerError("the engine was closed during a round", where="LocalEngine.round")
        try:
            return answer(self._computation, kind, arrays, task)
        except PaviError:
            raise
        except Exception as error:  # the border to foreign code: the same type as from a worker process
            raise WorkerError("a task failed", where=f"task {index} of round {kind!r}", got=f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Let go of the computation, once what is being computed has ended."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._computation = None

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

"""The engine for one process: tasks one after the other, no cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from pavi_scale.errors import PaviError, WorkerError
from pavi_scale.server.answer import align_all, answer, torch_threads
from pavi_scale.server.protocol import Computation, Spec


class LocalEngine:
    """Answers rounds in this process.

    Args:
        spec: The computation; built at once, on this thread.

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

    def __init__(self, spec: Spec) -> None:
        self._threads: int | None = getattr(spec, "threads", None)
        with torch_threads(self._threads):
            self._computation: Computation | None = spec.build()

    @property
    def parallelism(self) -> int:
        """Tasks that run at the same time: one."""
        return 1

    def round(self, kind: str, state: Mapping[str, np.ndarray], tasks: Sequence[Mapping[str, Any]]) -> list[dict[str, np.ndarray]]:
        """The answers to `tasks`, in their order.

        Args:
            kind: What is asked.
            state: Named arrays that all tasks share.
            tasks: One mapping per task.

        Raises:
            PaviError: As raised by the computation.
            WorkerError: The computation raised anything else (chained), or the engine is closed.
        """
        if self._computation is None:
            raise WorkerError("the engine is closed", where="LocalEngine.round", remedy="make a new one")
        arrays = align_all(state)
        results = []
        with torch_threads(self._threads):
            for index, task in enumerate(tasks):
                try:
                    results.append(answer(self._computation, kind, arrays, task))
                except PaviError:
                    raise
                except Exception as error:  # the border to foreign code: the same type as from a worker process
                    raise WorkerError("a task failed", where=f"task {index} of round {kind!r}", got=f"{type(error).__name__}: {error}") from error
        return results

    def close(self) -> None:
        """Let go of the computation."""
        self._computation = None

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

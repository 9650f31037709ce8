"""A process that has imported everything and forks a child for each order: a fit to be killed costs a fraction of a second.

Orders are JSON lines: {"path", "kind", "kill_at", "repeat"}; answered by {"pid"} at once and {"code"} (negative: a signal) when the child has ended.
`kill_at` counts calls that change the disk: before the n-th, or in the middle of it where it writes, the child sends itself SIGKILL.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

import pavi_scale.run
from pavi_scale.errors import Interrupted, PaviError
from tests.faults import study

CALLS = ("mkdir", "write", "fsync", "rename", "replace", "rmdir", "unlink", "link")


def count(limit: int | None) -> list[int]:
    """Count calls that change the disk, in this process; die at the `limit`-th."""
    done = [0]

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            done[0] += 1
            if done[0] == limit:
                if name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))
    pavi_scale.run.save_file = wrap("save_file", pavi_scale.run.save_file)
    return done


def usage(path: Path, kind: str) -> tuple[int, int, int]:
    """Open handles, resident bytes and threads after one more fit."""
    study.begin(path, kind)
    shutil.rmtree(path)
    gc.collect()
    me = psutil.Process()
    return me.num_fds(), me.memory_info().rss, me.num_threads()


def child(order: dict[str, Any]) -> int:
    path = Path(order["path"])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the command does
    if order.get("repeat"):
        path.with_suffix(".usage").write_text(json.dumps([usage(path, order["kind"]) for _ in range(order["repeat"])]))
        return 0
    counted = count(order.get("kill_at"))
    try:
        study.go_on(path, order["kind"])
    except KeyboardInterrupt:
        return Interrupted.exit_code
    except PaviError as error:
        path.with_suffix(".error").write_text(str(error))
        return error.exit_code
    path.with_suffix(".count").write_text(str(counted[0]))
    return 0


def main() -> None:
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                code = child(json.loads(line))
            finally:
                os._exit(code)
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()

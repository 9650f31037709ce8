"""What a second process gains on this machine at best: arithmetic on a few numbers that never leave the cache, by one process and by two at the same time.

Processors that are shared with others, or that clock down when all of them are busy, give two processes less than twice the work of one; what shares
its work among them cannot gain more than that.
"""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
from numba import njit

NUMBERS, TURNS = 256, 200_000  # float32 in a loop that is compiled to vector instructions
SECONDS = 10.0


@njit(error_model="numpy")  # type: ignore[misc]
def _turn(x: np.ndarray, times: int) -> None:
    """x <- 1 - x / 2 + x^2 / 8 - x^3 / 48, so many times: to its fixed point."""
    for _ in range(times):
        for i in range(len(x)):
            y = x[i]
            x[i] = np.float32(1.0) + y * (np.float32(-0.5) + y * (np.float32(0.125) - y * np.float32(1.0 / 48.0)))


def rate(seconds: float) -> float:
    """Polynomials per second that this process takes."""
    x, done, began = np.ones(NUMBERS, np.float32), 0, time.perf_counter()
    while time.perf_counter() < began + seconds:
        _turn(x, TURNS)
        done += NUMBERS * TURNS
    return done / (time.perf_counter() - began)


def gain(seconds: float = SECONDS) -> float:
    """The work of two processes at the same time over that of one alone."""
    return sum(_rates(2, seconds)) / _rates(1, seconds)[0]


def _rates(processes: int, seconds: float) -> list[float]:
    command = [sys.executable, "-W", "ignore", "-m", "pipelines.bench.ceiling", str(seconds)]
    some = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    try:
        for each in some:  # all are ready before one begins
            each.stdout.readline()  # type: ignore[union-attr]
        for each in some:
            print(file=each.stdin, flush=True)
        return [float(each.communicate()[0]) for each in some]
    finally:
        for each in some:
            each.kill()


def main() -> None:
    """One process of `gain`: says that it is ready, waits for a line, works, and prints its rate."""
    rate(0.1)
    print("ready", flush=True)
    input()
    print(rate(float(sys.argv[1])))


if __name__ == "__main__":
    main()

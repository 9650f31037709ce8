"""Starting a cluster for one fit, and ending it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from distributed import Client, LocalCluster


@contextlib.contextmanager
def local_cluster(workers: int, threads: int) -> Iterator[Client]:
    """A client of worker processes on this machine; everything listens on the loopback interface, and there is no dashboard.

    Args:
        workers: Worker processes.
        threads: Threads of each.
    """
    with (
        LocalCluster(n_workers=workers, threads_per_worker=threads, processes=True, host="127.0.0.1", dashboard_address=None) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.wait_for_workers(workers, timeout=60)
        yield client

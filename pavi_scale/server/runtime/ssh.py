"""A Dask worker on another machine, started and held by one ssh connection."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shlex

import dask.config
from distributed.deploy.spec import ProcessInterface

from pavi_scale.server.clusters import SSHCluster
from pavi_scale.server.runtime.credentials import Credentials

logger = logging.getLogger(__name__)


def worker_command(scheduler: str, name: str, options: SSHCluster) -> str:
    """The shell command that starts a worker; its credentials come on standard input and are never on a command line or a disk."""
    call = [*shlex.split(options.python), "-m", "distributed.cli.dask_worker", scheduler, "--name", name, "--nthreads", str(options.threads), "--no-nanny"]
    call += ["--interface", options.worker_interface or options.interface, "--dashboard-address", "127.0.0.1:0", "--no-dashboard"]
    call += ["--death-timeout", "60"]
    parts = ["IFS= read -r DASK_INTERNAL_INHERIT_CONFIG", "export DASK_INTERNAL_INHERIT_CONFIG", f"exec {shlex.join(call)}"]
    if options.directory is not None:
        parts.insert(0, f"cd {shlex.quote(options.directory)}")
    return " && ".join(parts)


def settings_line(credentials: Credentials) -> bytes:
    """Dask's configuration of a worker in the form in which Dask hands it to its own children."""
    tls = {"ca-file": credentials.ca, "worker": {"cert": credentials.cert, "key": credentials.key}}
    config = {"distributed": {"comm": {"require-encryption": True, "tls": tls}}}
    return dask.config.serialize(config).encode() + b"\n"


class SSHWorker(ProcessInterface):  # type: ignore[misc] # Dask is untyped here
    """One worker.

    Args:
        scheduler: The scheduler's address.
        host: The machine.
        options: The cluster's options.
        credentials: Of the run.
        name: The worker's name.
    """

    def __init__(self, scheduler: str, host: str, options: SSHCluster, credentials: Credentials, name: object = None) -> None:
        super().__init__()
        self._call = [*options.command, host, worker_command(scheduler, str(name), options)]
        self._settings = settings_line(credentials)
        self._process: asyncio.subprocess.Process | None = None

    @property
    def ended(self) -> bool:
        """Whether it was started and is gone."""
        return self._process is not None and self._process.returncode is not None

    async def start(self) -> None:
        """Start it; that it joins is left to Dask."""
        null = asyncio.subprocess.DEVNULL
        self._process = await asyncio.create_subprocess_exec(*self._call, stdin=asyncio.subprocess.PIPE, stdout=null, stderr=null, start_new_session=True)
        if self._process.stdin is not None:
            with contextlib.suppress(ConnectionError):  # no such host: the worker never joins
                self._process.stdin.write(self._settings)
                await self._process.stdin.drain()
        await super().start()

    async def close(self) -> None:
        """End the connection, and with it a worker that did not end by itself."""
        process = self._process
        if process is not None and process.returncode is None:
            process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 5.0)
            if process.returncode is None:
                process.kill()
                await process.wait()
        await super().close()

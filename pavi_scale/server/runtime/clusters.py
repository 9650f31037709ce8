"""Starting a cluster for one fit, replacing the workers that it loses, and ending it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import dask.config
from distributed import Client, LocalCluster, Scheduler, Security, SpecCluster
from distributed.comm import connect
from distributed.core import Status

from pavi_scale.errors import ClusterLost, StudyError
from pavi_scale.server import clusters
from pavi_scale.server.runtime.credentials import Credentials
from pavi_scale.server.runtime.ssh import SSHWorker

logger = logging.getLogger(__name__)

# Dask opens an HTTP server in each process, dashboard or not: on the loopback interface and any port, so that nobody else sees it.
HIDDEN = "127.0.0.1:0"
KEEP_SECONDS = 5.0  # between looks for lost workers
ANSWER_SECONDS = 30.0  # for a scheduler that runs already
JOIN_SECONDS = 300.0  # for workers on this machine


@contextlib.contextmanager
def open_cluster(options: clusters.Cluster) -> Iterator[Client]:
    """A client of the cluster that a file describes, once a worker is there.

    Args:
        options: What the file says.

    Raises:
        StudyError: A package that the kind of cluster needs is missing, or its command, interface or file is.
        ClusterLost: No worker joined in time, or the scheduler does not answer.
    """
    with contextlib.ExitStack() as stack:
        match options:
            case clusters.LocalCluster():
                client = stack.enter_context(local_cluster(options.workers, options.threads))
            case clusters.CudaCluster():
                client = stack.enter_context(_cuda(options))
            case clusters.SchedulerCluster():
                client = stack.enter_context(_scheduler(options))
            case clusters.SSHCluster():
                client = stack.enter_context(_remote(options, partial(_ssh_cluster, options)))
            case _:
                with _clear(f"directory {options.shared!r} of the cluster file"):
                    shared = Path(options.shared).expanduser()
                    shared.mkdir(parents=True, exist_ok=True)
                    folder, security = stack.enter_context(Credentials.make().files(shared.resolve()))
                client = stack.enter_context(_remote(options, partial(queue_cluster, options, folder, security)))
        yield client


@contextlib.contextmanager
def local_cluster(workers: int, threads: int) -> Iterator[Client]:
    """A client of worker processes on this machine; everything listens on the loopback interface, and there is no dashboard.

    Args:
        workers: Worker processes.
        threads: Threads of each.
    """
    with (
        LocalCluster(
            n_workers=workers, threads_per_worker=threads, processes=True, host="127.0.0.1", dashboard_address=HIDDEN, scheduler_kwargs={"dashboard": False}
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        _wait(client, workers, JOIN_SECONDS)
        yield client


@contextlib.contextmanager
def _cuda(options: clusters.CudaCluster) -> Iterator[Client]:
    kind = _optional("dask_cuda", "LocalCUDACluster", "cuda")
    with _clear("the CUDA cluster"):
        cluster = kind(
            n_workers=options.workers, host="127.0.0.1", protocol="tcp", dashboard_address=HIDDEN, threads_per_worker=1,
            device_memory_limit=options.device_memory or "default", resources={"GPU": 1},
        )
    with cluster, Client(cluster, set_as_default=False) as client:
        _wait(client, 1, JOIN_SECONDS)
        yield client


@contextlib.contextmanager
def _scheduler(options: clusters.SchedulerCluster) -> Iterator[Client]:
    security = None
    if options.address.startswith("tls://"):
        for name in ("ca", "cert", "key"):
            with _clear(f"key {name!r} of the cluster file"):
                Path(getattr(options, name)).read_bytes()
        files = {"tls_ca_file": options.ca, "tls_client_cert": options.cert, "tls_client_key": options.key}
        security = Security(require_encryption=True, **files)
    limit = min(options.patience, ANSWER_SECONDS)
    try:
        asyncio.run(asyncio.wait_for(_reach(options.address, security or Security(), limit), limit))
        client = Client(options.address, security=security, set_as_default=False, timeout=limit)
    except OSError as error:
        raise ClusterLost(
            "the scheduler does not answer", where=options.address, expected="a scheduler with these credentials", got=str(error) or f"no word in {limit:g} s",
            remedy="check that it runs, its address and certificates; then run the same command again",
        ) from error
    # Not only the first worker is waited for: a killed scheduler takes all workers with it, and both are back only after a while.
    with client, dask.config.set({"pavi-scale.patience": options.patience}):
        _wait(client, options.workers, options.patience)
        yield client


async def _reach(address: str, security: Security, limit: float) -> None:
    """Connect, and no more: what listens there may be no scheduler, or a stopped one, and a client would wait for its first word for ever."""
    comm = await connect(address, timeout=limit, **security.get_connection_args("client"))
    comm.abort()


@contextlib.contextmanager
def _remote(options: clusters.Remote, start: Callable[[], Any]) -> Iterator[Client]:
    # Jobqueue reads its configuration whenever it submits a job, and Dask its patience whenever a worker is lost: both must hold until the end.
    wait = {"distributed.deploy.lost-worker-timeout": f"{options.lost_after:g}s", "pavi-scale.patience": options.patience}
    with dask.config.set({**wait, "jobqueue.pavi-scale": NO_DEFAULTS}):
        with _clear(f"cluster of kind {getattr(options, 'kind', '')!r}"):
            cluster = start()
        with cluster, Client(cluster, set_as_default=False) as client:
            with _clear(f"cluster of kind {getattr(options, 'kind', '')!r}"):
                cluster.sync(_scaled, cluster, options.workers)
            with kept(cluster, options.workers):
                _wait(client, 1, options.patience)
                yield client


async def _scaled(cluster: Any, workers: int) -> None:
    """Scale a cluster, so that a refused job is an error now, not a line in a log: Dask submits jobs once, and raises where that is waited for first."""
    cluster.scale(workers)
    try:
        await cluster._correct_state()
    except Exception:
        for worker in list(cluster._created):  # closing would trip over what has never begun, and hide why
            if worker.status == Status.created:
                cluster._created.discard(worker)
        raise


def _ssh_cluster(options: clusters.SSHCluster) -> SpecCluster:
    if shutil.which(options.command[0]) is None:
        raise FileNotFoundError(f"there is no command {options.command[0]!r} here")
    credentials = Credentials.make()
    security = credentials.security()
    # The keys are the workers' own names: by them Dask finds out which one was lost.
    hosts = {f"pavi-{number}": options.hosts[number % len(options.hosts)] for number in range(options.workers)}
    spec = {name: {"cls": SSHWorker, "options": {"host": host, "options": options, "credentials": credentials}} for name, host in hosts.items()}
    scheduler = {"cls": Scheduler, "options": scheduler_options(options.interface, security)}
    return SpecCluster(workers=spec, scheduler=scheduler, security=security, name="pavi-scale", silence_logs=logging.WARNING)


def scheduler_options(interface: str, security: Security) -> dict[str, Any]:
    """How the driver's scheduler listens: encrypted, on one interface, no dashboard."""
    return {"protocol": "tls://", "interface": interface, "security": security, "dashboard": False, "dashboard_address": HIDDEN}


def queue_cluster(options: clusters.SlurmCluster | clusters.PBSCluster | clusters.LSFCluster, folder: Path, security: Security) -> Any:
    """A cluster of batch jobs; `job_script()` of the result is what is submitted.

    Args:
        options: What the file says.
        folder: Folder of the run's credentials in the shared directory; the jobs' logs go beside it.
        security: Credentials, in files that the nodes see.

    Raises:
        StudyError: dask-jobqueue is missing.
        FileNotFoundError: The batch system's command is.
    """
    python = options.python or shlex.quote(sys.executable)
    common: dict[str, Any] = {
        "cores": options.threads, "processes": 1, "memory": options.memory, "interface": options.interface,
        "security": security, "protocol": "tls://", "scheduler_options": scheduler_options(options.interface, security),
        "log_directory": str(folder.parent / "logs"), "nanny": False, "death_timeout": 120, "job_script_prologue": list(options.prologue),
        "python": f"exec {python}",
        "worker_extra_args": ["--dashboard-address", HIDDEN, "--no-dashboard"], "job_name": "pavi-scale", "walltime": options.walltime, "queue": options.queue,
        "config_name": "pavi-scale", "shared_temp_directory": str(folder),
    }  # fmt: skip
    if options.lifetime is not None:
        # The stagger keeps workers that began together from ending together.
        common["worker_extra_args"] += ["--lifetime", options.lifetime.replace(" ", ""), "--lifetime-stagger", "1m"]
    directives = list(options.directives)
    match options:
        case clusters.SlurmCluster():
            kind, own = "SLURMCluster", {"account": options.account}
            # SLURM signals the batch shell, which is the worker by now (`exec`): it hands its task back and ends before the job is killed.
            directives += ["--requeue"] if options.requeue else ["--no-requeue"]
        case clusters.PBSCluster():
            kind, own = "PBSCluster", {"account": options.account}
        case _:
            kind, own = "LSFCluster", {"project": options.account}
    cls = _optional("dask_jobqueue", kind, options.kind)
    if shutil.which(cls.job_cls.submit_command) is None:
        raise FileNotFoundError(f"there is no command {cls.job_cls.submit_command!r} here")
    return cls(job_extra_directives=directives, **common, **own)


# Stands for the user's own configuration of jobqueue: the cluster file says everything, on every machine the same.
NO_DEFAULTS: dict[str, Any] = {
    "name": "pavi-scale", "cores": None, "memory": None, "processes": 1, "python": None, "interface": None, "death-timeout": 120, "local-directory": None,
    "shared-temp-directory": None, "extra": None, "worker-command": "distributed.cli.dask_worker", "worker-extra-args": [], "queue": None, "account": None,
    "project": None, "walltime": None, "env-extra": None, "job-script-prologue": [], "job-extra": None, "job-extra-directives": [],
    "job-directives-skip": [], "log-directory": None, "shebang": "#!/usr/bin/env bash", "job-cpu": None, "job-mem": None, "resource-spec": None,
    "ncpus": None, "mem": None, "use-stdin": None, "lsf-units": None, "scheduler-options": {},
}  # fmt: skip


@contextlib.contextmanager
def kept(cluster: Any, workers: int) -> Iterator[None]:
    """While inside, workers that were lost are started again: Dask forgets them after a while, and does nothing until it is asked to scale."""
    stop = threading.Event()

    def renew() -> None:
        # One that ended before it joined was never known to the scheduler: nobody else would miss it.
        for name in [name for name, worker in cluster.workers.items() if getattr(worker, "ended", False)]:
            del cluster.workers[name]
        cluster.scale(workers)

    def keep() -> None:
        while not stop.wait(KEEP_SECONDS):
            cluster.loop.add_callback(renew)

    thread = threading.Thread(target=keep, name="pavi-keeper", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _wait(client: Client, workers: int, patience: float) -> None:
    try:
        client.wait_for_workers(workers, timeout=patience)
    except TimeoutError as error:
        got = len(client.scheduler_info(n_workers=-1)["workers"])
        raise ClusterLost(
            "no worker joined", where=client.scheduler.address, expected=f"{workers} within {patience:g} s", got=got,
            remedy="look at the queue and the workers' logs, then run the same command again",
        ) from error


def _optional(module: str, name: str, extra: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        package = module.replace("_", "-")
        where, remedy = f"cluster of kind {extra!r}", f"pip install {package}"
        raise StudyError("a package is missing", where=where, expected=package, got=str(error), remedy=remedy) from error


@contextlib.contextmanager
def _clear(where: str) -> Iterator[None]:
    """What the operating system or Dask says about a wrong option, as an error of the package."""
    try:
        yield
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        got = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        raise StudyError("the cluster cannot be started", where=where, got=got, remedy="check the cluster file: commands, interface, directories") from error

"""What a cluster file may say, one class for each kind; checked key by key, nothing is started here."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Count = Annotated[int, Field(ge=1, le=4096)]
# What ends up in a job script or on a command line is one line, so that no value can begin a command of its own.
Line = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]+$")]
Word = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@%+-]*$")]
Span = Annotated[str, Field(pattern=r"^[0-9]+ ?(s|m|h|d)$")]


class Strict(BaseModel):
    """No unknown keys, no conversions, no change afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LocalCluster(Strict):
    """Processes on this machine; everything listens on the loopback interface.

    Args:
        kind: "local".
        workers: Worker processes.
        threads: Threads of each.
    """

    kind: Literal["local"]
    workers: int = Field(default=2, ge=1, le=1024)
    threads: int = Field(default=1, ge=1, le=1024)


class CudaCluster(Strict):
    """One worker process for each CUDA device of this machine.

    Args:
        kind: "cuda".
        workers: Devices to use; None for all.
        device_memory: Bytes of a device that a worker may fill before it spills, such as "30GB".
    """

    kind: Literal["cuda"]
    workers: Count | None = None
    device_memory: Line | None = None


class SchedulerCluster(Strict):
    """A Dask cluster that runs already, on Kubernetes or started by hand; it is not ended with the fit.

    Args:
        kind: "scheduler".
        address: Of the scheduler: `tls://host:8786`, or `tcp://` on the loopback interface.
        ca: File of the certificate that the cluster's certificates are signed with.
        cert: File of this client's certificate.
        key: File of its key.
        workers: Workers to wait for.
        patience: Seconds to wait for them, and for others when all are lost.
    """

    kind: Literal["scheduler"]
    address: Annotated[str, Field(pattern=r"^(tls|tcp)://[^\s/]+:[0-9]{1,5}$")]
    ca: Line | None = None
    cert: Line | None = None
    key: Line | None = None
    workers: Count = 1
    patience: float = Field(default=300.0, gt=0)

    @model_validator(mode="after")
    def _secure(self) -> SchedulerCluster:
        host = self.address.partition("://")[2].rpartition(":")[0]
        if self.address.startswith("tcp://") and not re.fullmatch(r"localhost|127(\.[0-9]{1,3}){3}|\[::1\]", host):
            raise ValueError("off the loopback interface only tls:// is spoken")
        if self.address.startswith("tls://") and not (self.ca and self.cert and self.key):
            raise ValueError("tls:// needs `ca`, `cert` and `key`")
        return self


class Remote(Strict):
    """What clusters of several machines share: how many workers, and what they listen on. Their connections are always encrypted.

    Args:
        workers: Worker processes in all; lost ones are replaced for as long as the fit runs.
        threads: Threads of each.
        interface: Network interface, such as "eth0", of the driver and, on a batch system, of the workers.
        patience: Seconds to wait for the first worker (a queue can be long).
        lost_after: Seconds after which a lost worker is replaced; a requeued job may come back before.
    """

    workers: Count = 2
    threads: Count = 1
    interface: Word
    patience: float = Field(default=3600.0, gt=0)
    lost_after: float = Field(default=60.0, ge=0)


class SSHCluster(Remote):
    """Workers on machines that can be reached by ssh without a password.

    Args:
        kind: "ssh".
        hosts: The machines; workers go round them.
        command: How to reach one: its name and one shell command are added.
        python: The interpreter there; pavi-scale must be installed in it.
        directory: Working directory there.
        worker_interface: Network interface of the workers, where it has another name than the driver's.
    """

    kind: Literal["ssh"]
    hosts: list[Word] = Field(min_length=1, max_length=4096)
    command: list[Line] = ["ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=5"]
    python: Line = "python3"
    directory: Line | None = None
    worker_interface: Word | None = None


class QueueCluster(Remote):
    """Workers that are jobs of a batch system.

    Args:
        memory: Of one job, such as "4 GiB".
        shared: Directory that all nodes see: certificates and logs of the run go there.
        walltime: Of one job, as the batch system writes it.
        queue: Queue or partition.
        account: Account or project that is charged.
        lifetime: After so long a worker ends by itself, before the batch system ends it; another job takes its place. Such as "55m".
        directives: More directives of the job script, without their prefix, such as "--gres=gpu:1".
        prologue: Shell lines before the worker starts, such as "module load python".
        python: The interpreter on the nodes; None for the driver's own path.
    """

    memory: Line = "4 GiB"
    shared: Line
    walltime: Word = "01:00:00"
    queue: Word | None = None
    account: Word | None = None
    lifetime: Span | None = None
    directives: list[Line] = []
    prologue: list[Line] = []
    python: Line | None = None

    @field_validator("memory")
    @classmethod
    def _size(cls, value: str) -> str:
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)? ?([KMGT]i?)?B", value):
            raise ValueError("must be a size such as '4 GiB'")
        return value


class SlurmCluster(QueueCluster):
    """Jobs of SLURM.

    Args:
        kind: "slurm".
        requeue: Whether a preempted job goes back to the queue.
    """

    kind: Literal["slurm"]
    requeue: bool = True


class PBSCluster(QueueCluster):
    """Jobs of PBS.

    Args:
        kind: "pbs".
    """

    kind: Literal["pbs"]


class LSFCluster(QueueCluster):
    """Jobs of LSF.

    Args:
        kind: "lsf".
    """

    kind: Literal["lsf"]


Cluster = LocalCluster | CudaCluster | SchedulerCluster | SSHCluster | SlurmCluster | PBSCluster | LSFCluster
KINDS: dict[str, type[Cluster]] = {
    "local": LocalCluster,
    "cuda": CudaCluster,
    "scheduler": SchedulerCluster,
    "ssh": SSHCluster,
    "slurm": SlurmCluster,
    "pbs": PBSCluster,
    "lsf": LSFCluster,
}

"""A real SLURM on this machine: the GRE pipeline through cluster/slurm.yaml, a cancelled job and a preempted one."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import yaml

from pipelines import gre

HERE = Path(__file__).parent
NEEDED = [name for name in ("slurmctld", "slurmd", "munged", "runuser") if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.skipif(bool(NEEDED) or os.geteuid() != 0, reason=f"needs root and a SLURM: apt-get install slurm-wlm munge (missing: {NEEDED or 'root'})"),
]


@pytest.fixture(scope="module")
def slurm():
    """Environment of a SLURM of one node with two processors."""
    folder = tempfile.mkdtemp(prefix="slurm-", dir="/tmp")  # sockets want short names
    script = [str(HERE / "slurm.sh")]
    environment = os.environ | {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    started = subprocess.run([*script, "start", folder], env=environment, capture_output=True, text=True, timeout=120)
    try:
        if started.returncode:
            logs = "".join(p.read_text()[-1500:] for p in Path(folder).glob("*.log"))
            pytest.skip(f"SLURM does not start here: {started.stderr} {logs}")
        yield environment | {"SLURM_CONF": f"{folder}/slurm.conf"}
    finally:
        subprocess.run([*script, "stop", folder], env=environment, timeout=90, check=False)
        shutil.rmtree(folder, ignore_errors=True)


def jobs(environment, state="R"):
    out = subprocess.run(["squeue", "-h", "-n", "pavi-scale", "-t", state, "-o", "%i"], env=environment, capture_output=True, text=True, timeout=20, check=True)
    return sorted(map(int, out.stdout.split()))


def test_a_refused_job_is_an_error_at_once(slurm, tools, gre_cohort, tmp_path, monkeypatch):
    (tmp_path / "slurm.yaml").write_text(f"{{kind: slurm, interface: lo, shared: '{tmp_path}/shared', queue: nowhere}}\n")
    study = tools.write_study(tmp_path, "gre", gre_cohort, tmp_path / "run", "slurm.yaml", progress=False)
    monkeypatch.setitem(tools.environment, "SLURM_CONF", slurm["SLURM_CONF"])
    done = tools.call(tmp_path, "fit", study)
    assert done.returncode == 2, done.stderr
    assert "invalid partition" in done.stderr
    assert not list((tmp_path / "shared").glob("pavi-scale-*")), "credentials are left behind"


@pytest.mark.timeout(580)
def test_gre_survives_a_cancelled_and_a_preempted_job(slurm, tools, tmp_path, monkeypatch):
    gre.make_cohort(str(tmp_path / "gre.zarr"), groups=4_000_000, observations=2, features=4)
    options = yaml.safe_load((tools.root / "cluster/slurm.yaml").read_text())
    options |= {"workers": 2, "memory": "2 GiB", "interface": "lo", "shared": str(tmp_path / "shared"), "queue": "low", "lost_after": 5, "patience": 240}
    (tmp_path / "slurm.yaml").write_text(yaml.safe_dump(options))
    study = tools.write_study(tmp_path, "gre", tmp_path / "gre.zarr", tmp_path / "run", "slurm.yaml", progress=False)
    monkeypatch.setitem(tools.environment, "SLURM_CONF", slurm["SLURM_CONF"])
    driver = tools.spawn(tmp_path, "fit", study)
    try:
        tools.wait_for(lambda: driver.poll() is not None or len(tools.events(tmp_path / "run", "worker joined")) > 1, 200)
        assert driver.poll() is None, (tmp_path / "driver.log").read_text()
        first = jobs(slurm)
        assert len(first) == 2
        # More important work takes a processor: SLURM sends SIGTERM to one of ours, and requeues it. The other one is cancelled.
        hurry = ["sbatch", "-p", "high", "-n1", "--mem=100", "-o", "/dev/null", "-D", str(tmp_path), "--wrap", "sleep 4"]
        subprocess.run(hurry, env=slurm, check=True, timeout=20, capture_output=True)
        preempted = tools.wait_for(lambda: set(first) - set(jobs(slurm)), 30).pop()
        (other,) = set(first) - {preempted}
        subprocess.run(["scancel", str(other)], env=slurm, check=True, timeout=20)
        assert not tools.events(tmp_path / "run", "done")
        assert driver.wait(timeout=300) == 0, (tmp_path / "driver.log").read_text()
    finally:
        driver.kill()
        driver.wait()
    found = tools.events(tmp_path / "run")
    assert len([e for e in found if e["event"] == "worker left"]) >= 2
    assert len([e for e in found if e["event"] == "worker joined"]) >= 3
    assert not jobs(slurm, "R,PD"), "jobs are left behind"
    assert not [p for p in (tmp_path / "shared").iterdir() if p.name != "logs"], "credentials are left behind"
    here = tools.write_study(tmp_path, "gre", tmp_path / "gre.zarr", tmp_path / "here", progress=False)
    assert tools.call(tmp_path, "fit", here).returncode == 0
    assert tools.digest(tmp_path / "run") == tools.digest(tmp_path / "here")

"""Cluster files: those of the repository are valid, wrong ones are refused in one sentence, and the job scripts say what they should."""

import os
import shlex
import socket
import stat
import subprocess
import sys
import time
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import jsonschema
import pytest
import yaml
from cryptography import x509
from cryptography.exceptions import InvalidSignature

from pavi_scale.config import load_cluster
from pavi_scale.errors import ClusterLost, StudyError
from pavi_scale.server.runtime.clusters import NO_DEFAULTS, open_cluster, queue_cluster
from pavi_scale.server.runtime.credentials import Credentials

dask = pytest.importorskip("dask")
QUEUE = "workers: 2\ninterface: lo\nshared: s\n"


@pytest.mark.parametrize("name", ["local", "ssh", "slurm", "pbs", "lsf", "cuda", "kubernetes/cluster"])
def test_files_of_the_repository_are_valid(root, name):
    path = root / "cluster" / f"{name}.yaml"
    assert load_cluster(path).kind in (Path(name).name, "scheduler")
    folder = path.parent
    assert (folder / "README.md").exists()
    listed = (root / "cluster/README.md").read_text()
    assert name.split("/")[0] in listed


BAD = {
    "no kind": ("workers: 2", "cluster key is missing", "'kind'"),
    "unknown kind": ("kind: slrum", "unknown kind", "did you mean 'slurm'?"),
    "kind of no text": ("kind: [local]", "unknown kind", "one of local"),
    "unknown key": ("kind: local\nworker: 2", "unknown cluster key", "did you mean 'workers'"),
    "no interface": ("kind: slurm\nshared: s", "cluster key is missing", "'interface'"),
    "a second line": ('kind: slurm\ninterface: lo\nshared: s\ndirectives: ["x\\nrm -rf /"]', "wrong value", "directives"),
    "a command in a queue": (f"kind: pbs\n{QUEUE}queue: 'q; rm'", "wrong value", "queue"),
    "an option in place of a host": ("kind: ssh\ninterface: lo\nhosts: [-oProxyCommand=x]", "wrong value", "hosts"),
    "no hosts": ("kind: ssh\ninterface: lo\nhosts: []", "wrong value", "hosts"),
    "size": (f"kind: lsf\n{QUEUE}memory: lots", "wrong value", "memory"),
    "lifetime": (f"kind: slurm\n{QUEUE}lifetime: 55", "wrong value", "lifetime"),
    "plain TCP beyond this machine": ("kind: scheduler\naddress: tcp://10.0.0.1:8786", "wrong value", "only tls://"),
    "TLS without certificates": ("kind: scheduler\naddress: tls://10.0.0.1:8786", "wrong value", "`ca`, `cert`"),
    "no workers": ("kind: local\nworkers: 0", "wrong value", "workers"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_files_are_refused(tmp_path, case):
    text, *words = BAD[case]
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(StudyError) as caught:
        load_cluster(tmp_path / "c.yaml")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def opened(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with open_cluster(load_cluster(tmp_path / "c.yaml")):
        pass


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"kind: pbs\n{QUEUE}", "no command 'qsub'"),
        ("kind: ssh\ninterface: lo\nhosts: [a]\ncommand: [no-such-ssh]", "no command 'no-such-ssh'"),
        ("kind: scheduler\naddress: tls://127.0.0.1:1\nca: a\ncert: b\nkey: c", "key 'ca'"),
        ("kind: cuda", "dask-cuda"),
    ],
)
def test_what_is_missing_is_said(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    if words == "dask-cuda" and find_spec("dask_cuda"):
        pytest.skip("dask-cuda is installed")
    with pytest.raises(StudyError) as caught:
        opened(tmp_path, text)
    assert words in str(caught.value)
    assert not [p for p in tmp_path.glob("s/*")], "credentials are left behind"


def test_what_listens_but_is_no_scheduler(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        begun = time.monotonic()
        with pytest.raises(ClusterLost, match="the scheduler does not answer") as caught:
            opened(tmp_path, f"kind: scheduler\naddress: tcp://127.0.0.1:{mute.getsockname()[1]}\npatience: 1")
    assert time.monotonic() - begun < 10
    assert caught.value.exit_code == 75


COMMANDS = {"slurm": "sbatch", "pbs": "qsub", "lsf": "bsub"}


@pytest.mark.parametrize("kind", COMMANDS)
def test_job_scripts(root, tmp_path, monkeypatch, kind):
    pytest.importorskip("dask_jobqueue")
    # The script is looked at, not submitted: a command of that name must be there, and is never run.
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "qsub", "bsub", "lsadmin"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    text = (root / "cluster" / f"{kind}.yaml").read_text() + "\nqueue: day\naccount: abc\ndirectives: ['-x 1']\nprologue: ['module load python']\n"
    (tmp_path / "c.yaml").write_text(text.replace("ib0", "lo"))
    options = load_cluster(tmp_path / "c.yaml")
    with Credentials.make().files(tmp_path) as (folder, security), dask.config.set({"jobqueue.pavi-scale": NO_DEFAULTS}):
        with queue_cluster(options, folder, security) as cluster:
            script = cluster.job_script()
        assert {stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} == {0o600}
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert not any(line in script for line in (folder / "key.pem").read_text().splitlines()), "the key is in the script"
    assert not folder.exists()
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    lines = script.splitlines()
    assert lines.index("module load python") == len(lines) - 2
    worker = shlex.split(lines[-1])
    assert worker[:4] == ["exec", sys.executable, "-m", "distributed.cli.dask_worker"]
    given = dict(pairwise(worker))
    assert given["--nthreads"] == "1"
    assert given["--dashboard-address"] == "127.0.0.1:0"
    assert given["--protocol"] == "tls://"
    assert given["--interface"] == "lo"
    assert given["--lifetime"] == "55m"
    assert Path(given["--tls-key"]).name == "key.pem"
    assert "--no-nanny" in worker
    expected = {
        "slurm": ["#SBATCH -p day", "#SBATCH -A abc", "#SBATCH --mem=4G", "#SBATCH -t 01:00:00", "#SBATCH --requeue", "#SBATCH -x 1"],
        "pbs": ["#PBS -q day", "#PBS -A abc", "#PBS -l select=1:ncpus=1:mem=4096MB", "#PBS -l walltime=01:00:00", "#PBS -x 1"],
        "lsf": ["#BSUB -q day", '#BSUB -P "abc"', "#BSUB -n 1", "#BSUB -W 01:00", "#BSUB -x 1"],
    }
    assert set(expected[kind]) <= set(lines), script


def strict(root):
    return jsonschema.Draft202012Validator(yaml.safe_load((root / "tests/cluster/daskcluster.schema.json").read_text()))


def test_kubernetes_manifests(root):
    folder = root / "cluster/kubernetes"
    cluster, driver, policy = (yaml.safe_load((folder / f"{name}.yaml").read_text()) for name in ("daskcluster", "driver", "policy"))
    validator = strict(root)
    assert [e.message for e in validator.iter_errors(cluster)] == []
    pod = driver["spec"]["template"]["spec"]
    assert [e.message for e in validator.evolve(schema=validator.schema["$defs"]["pod"]).iter_errors(pod)] == []
    broken = yaml.safe_load((folder / "daskcluster.yaml").read_text())
    broken["spec"]["worker"]["spec"]["containers"][0]["imag"] = "x"
    assert list(validator.iter_errors(broken)), "the schema accepts anything"
    name = cluster["metadata"]["name"]
    selector = policy["spec"]["podSelector"]["matchLabels"]
    assert selector == {"dask.org/cluster-name": name}
    assert selector.items() <= driver["spec"]["template"]["metadata"]["labels"].items()
    for part in ("scheduler", "worker"):
        (container,) = cluster["spec"][part]["spec"]["containers"]
        assert {"--tls-ca-file=/etc/pavi-scale/tls/ca.pem", "--tls-cert=/etc/pavi-scale/tls/cert.pem"} <= set(container["args"])
        assert container["securityContext"]["runAsNonRoot"]
    assert load_cluster(folder / "cluster.yaml").address == f"tls://{name}-scheduler:8786"
    assert 75 not in driver["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]


def test_credentials_are_signed_by_an_authority_of_their_own():
    one, two = Credentials.make(), Credentials.make()
    ca, cert = (x509.load_pem_x509_certificate(text.encode()) for text in (one.ca, one.cert))
    cert.verify_directly_issued_by(ca)
    with pytest.raises(InvalidSignature):
        cert.verify_directly_issued_by(x509.load_pem_x509_certificate(two.ca.encode()))
    assert not cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert ca.public_key() != cert.public_key()
    assert one.key != two.key


def test_credentials_of_the_shell_script(root, tmp_path):
    if subprocess.run(["openssl", "version"], capture_output=True, check=False).returncode:
        pytest.skip("needs openssl")
    subprocess.run([root / "cluster/credentials.sh", tmp_path / "tls"], check=True)
    ca, cert = (x509.load_pem_x509_certificate((tmp_path / "tls" / f"{name}.pem").read_bytes()) for name in ("ca", "cert"))
    cert.verify_directly_issued_by(ca)
    assert {p.name for p in (tmp_path / "tls").iterdir()} == {"ca.pem", "cert.pem", "key.pem"}
    assert stat.S_IMODE((tmp_path / "tls/key.pem").stat().st_mode) == 0o600

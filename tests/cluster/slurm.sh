#!/usr/bin/env bash
# A SLURM of one node with two processors, for tests: `slurm.sh start DIR`, `slurm.sh stop DIR`. Needs root, slurm-wlm, munge.
# Everything lies in DIR; point SLURM_CONF at DIR/slurm.conf.
set -euo pipefail
action=$1 dir=$2 host=$(hostname -s)

start() {
    mkdir -p "$dir"/{munge,ctld,d}
    chmod 755 "$dir"
    dd if=/dev/urandom of="$dir/munge/key" bs=1024 count=1 status=none
    chown -R munge: "$dir/munge"
    chmod 711 "$dir/munge"
    chmod 400 "$dir/munge/key"
    cat > "$dir/slurm.conf" <<CONF
ClusterName=pavi
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${SLURM_TEST_PORT:-16817}
SlurmdPort=$((${SLURM_TEST_PORT:-16817} + 1))
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
StateSaveLocation=$dir/ctld
SlurmdSpoolDir=$dir/d
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
KillWait=5
SchedulerParameters=sched_interval=2,bf_interval=2,requeue_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=8000 State=UNKNOWN
PartitionName=low Nodes=$host Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
PartitionName=high Nodes=$host MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
    runuser -u munge -- munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" \
        --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
    export SLURM_CONF="$dir/slurm.conf"
    slurmctld -c
    slurmd
    for _ in $(seq 40); do
        sinfo -h -o %t 2>/dev/null | grep -q idle && return
        sleep 0.5
    done
    echo "the node does not come up; logs in $dir" >&2
    exit 1
}

stop() {
    export SLURM_CONF="$dir/slurm.conf"
    timeout 5 scancel -u root 2>/dev/null || true
    for _ in $(seq 60); do
        [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break
        sleep 0.5
    done
    for pid in slurmd.pid slurmctld.pid munge/pid; do
        if [ -f "$dir/$pid" ]; then kill "$(cat "$dir/$pid")" 2>/dev/null || true; fi
    done
}

"$action"

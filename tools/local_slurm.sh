#!/usr/bin/env bash
# A throw-away Slurm on one machine: real munged, slurmctld and slurmd, several nodes, no systemd, no database.
#
#   tools/local_slurm.sh install [PACKAGE ...]  Debian's packages of Slurm, and others on the way, as root
#   tools/local_slurm.sh up DIR [NODES CPUS]    start it in DIR (default 2 nodes of 4 processors); then: export SLURM_CONF=DIR/slurm.conf
#   tools/local_slurm.sh down DIR               end its jobs and stop what `up` started there, and nothing else
#
# Nodes are n0, n1, ... on ports of their own; their names resolve nowhere, so jobs export MASTER_ADDR=127.0.0.1.
set -euo pipefail

install() {
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge "$@"
}

# A port that nobody listens on, and the next $1 - 1 ports after it.
free_ports() {
    python3 - "$1" <<'PY'
import contextlib, random, socket, sys
count = int(sys.argv[1])
for start in random.sample(range(20000, 30000), 200):
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
        for port in range(start, start + count):
            stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
        print(start)
        break
PY
}

write_config() {
    local dir=$1 nodes=$2 cpus=$3 host port
    host=$(hostname -s)
    port=$(free_ports $((nodes + 1)))
    cat >"$dir/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmdSpoolDir=$dir/spool-%n
StateSaveLocation=$dir/state
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
ReturnToService=2
KillWait=30
MessageTimeout=60
InactiveLimit=0
CONF
    for ((i = 0; i < nodes; i++)); do
        echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1 + i)) CPUs=$cpus RealMemory=4000 State=UNKNOWN"
    done >>"$dir/slurm.conf"
    echo "PartitionName=local Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4" >>"$dir/slurm.conf"
    echo >"$dir/cgroup.conf" # processes are tracked without cgroups
}

up() {
    local dir nodes=${2:-2} cpus=${3:-4}
    for daemon in munged slurmctld slurmd; do
        command -v "$daemon" >/dev/null || {
            echo "local_slurm: no $daemon; as root: tools/local_slurm.sh install" >&2
            exit 2
        }
    done
    mkdir -p "$1"/{state,log}
    mkdir -p "$1/munge"
    chmod 700 "$1/munge" # munged insists
    dir=$(cd "$1" && pwd)
    head -c 1024 /dev/urandom >"$dir/munge/key"
    chmod 600 "$dir/munge/key"
    write_config "$dir" "$nodes" "$cpus"
    export SLURM_CONF=$dir/slurm.conf
    munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munge.pid" \
        --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed"
    slurmctld
    for ((i = 0; i < nodes; i++)); do
        mkdir -p "$dir/spool-n$i"
        slurmd -N "n$i"
    done
    for ((try = 0; try < 300; try++)); do
        [[ $(sinfo --noheader --Node --format=%T 2>/dev/null | grep -cx idle) == "$nodes" ]] && return
        sleep 0.1
    done
    echo "local_slurm: not all $nodes nodes are idle after 30 s; see $dir/log" >&2
    sinfo --Node --long >&2 || true
    down "$dir"
    exit 1
}

# Jobs would outlive the daemons that started them.
end_jobs() {
    export SLURM_CONF=$1/slurm.conf
    for ((try = 0; try < 200; try++)); do
        scancel --quiet --user="$(id -un)" || return 0
        [[ $(squeue --noheader) ]] || return 0
        sleep 0.2
    done
    echo "local_slurm: jobs do not end:" >&2
    squeue >&2
}

stop() {
    kill "$1" 2>/dev/null || return 0
    for ((try = 0; try < 200; try++)); do
        grep -qs '^State:.[^Z]' "/proc/$1/status" || return 0 # gone, or dead and not yet collected by its parent
        sleep 0.05
    done
    echo "local_slurm: process $1 does not end" >&2
}

down() {
    local dir file
    [[ -d $1 ]] || return 0
    dir=$(cd "$1" && pwd)
    if [[ -s $dir/slurmctld.pid ]] && kill -0 "$(<"$dir/slurmctld.pid")" 2>/dev/null; then
        end_jobs "$dir"
    fi
    for file in "$dir"/slurmd-*.pid "$dir"/slurmctld.pid "$dir"/munge.pid; do
        if [[ -s $file ]]; then
            stop "$(<"$file")"
        fi
    done
}

case ${1:-} in
install) install "${@:2}" ;;
up) up "${@:2}" ;;
down) down "$2" ;;
*)
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac

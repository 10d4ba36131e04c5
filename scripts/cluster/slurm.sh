#!/usr/bin/env bash
# A search on a Slurm cluster: a Ray head on the first node, workers on all of them, the search beside the head.
#
#   sbatch scripts/cluster/slurm.sh space.yaml [OPTIONS OF hiertune search]
#
# The same command again goes on with the search of that name, for example after the time limit; so does Slurm
# itself after a preemption or the loss of a node (--requeue). Data, runs and .venv must be on a file system that
# every node sees. Secrets of the storage, the ledger and MLflow are taken from the environment of `sbatch`, as are
# HIERTUNE_STORAGE, HIERTUNE_LEDGER and MLFLOW_TRACKING_URI.
#
# CHANGE these lines:
#SBATCH --job-name=hiertune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
##SBATCH --gpus-per-node=1
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Two minutes before the time limit the search ends its epochs and saves.
#SBATCH --signal=B:TERM@120
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-.}"
[ -e .venv/bin/activate ] && source .venv/bin/activate # CHANGE: `module load ...` where you need one

# One token per job, in a file that only you can read: without it nobody on the network talks to this Ray.
scratch=$(mktemp -d "$PWD/.hiertune-$SLURM_JOB_ID.XXXXXX") # on the shared file system
trap 'rm -rf "$scratch"' EXIT
umask 077
python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$scratch/token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$scratch/token"
export HDF5_USE_FILE_LOCKING=FALSE # network file systems can't lock
export OMP_NUM_THREADS=1

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
# The address by which the other nodes reach the head, and a port of this job's own.
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname -I | tr ' ' '\n' | grep -m1 '\.')
port=$((20000 + SLURM_JOB_ID % 10000))

# A node's own Ray: its resources are those that Slurm gave it. Temporary files are local, one folder per job.
common=(--num-cpus="${SLURM_CPUS_PER_TASK:-1}" --disable-usage-stats)
[ -n "${SLURM_GPUS_ON_NODE:-}" ] && common+=(--num-gpus="$SLURM_GPUS_ON_NODE")

srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
    ray start --head --node-ip-address="$address" --port="$port" --dashboard-host=127.0.0.1 \
    --dashboard-port=$((port + 10000)) --temp-dir="/tmp/ray-$SLURM_JOB_ID" "${common[@]}" --block &
for node in "${nodes[@]:1}"; do
    # The head may still be starting: until it answers, try again.
    srun --nodes=1 --ntasks=1 --nodelist="$node" --overlap bash -c '
        until ray health-check --address "$1" >/dev/null 2>&1; do sleep 2; done
        exec ray start --address="$1" --block "${@:2}"
    ' - "$address:$port" "${common[@]}" &
done

until ray health-check --address "$address:$port" >/dev/null 2>&1; do sleep 2; done
export RAY_ADDRESS="$address:$port"

# On the head's node, as every driver needs a Ray node beside it. SIGTERM ends it in order.
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap python -m hiertune search "$@" --continue &
search=$!
signalled=
trap 'signalled=1; kill -TERM "$search"' TERM
while :; do # a signal ends the wait, not the search
    code=0
    wait "$search" || code=$?
    [ -n "$signalled" ] || break
    signalled=
done
# The nodes' Rays are this script's steps, and end with it.
kill $(jobs -p) 2>/dev/null || true
exit "$code"

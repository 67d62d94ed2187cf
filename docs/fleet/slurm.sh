#!/usr/bin/env bash
# Measure PyTorch builds on the nodes of a Slurm allocation:
#   sbatch --nodes 4 --gpus-per-node 8 slurm.sh 2.13.0..2.15.0
# The virtual environment and the working folder are on a disk that all nodes share.
#SBATCH --job-name=fpxbench
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=08:00:00
#SBATCH --signal=B:INT@120
set -euo pipefail
builds=${1:?usage: sbatch slurm.sh BUILDS [options of fpxbench fleet run]}
shift

export PATH="$PWD/.venv/bin:$PATH"
export FPX_FLEET_FOLDER=${FPX_FLEET_FOLDER:-/var/tmp/fpxbench-fleet-$UID}    # each node's own disk
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$head:6379

srun --nodes=1 --ntasks=1 --nodelist="$head" ray start --head --node-ip-address="$head" --port=6379 --block &
for _ in $(seq 60); do
    ray status --address "$address" >/dev/null 2>&1 && break
    sleep 2
done
if [ "${#nodes[@]}" -gt 1 ]; then
    srun --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) --exclude="$head" ray start --address="$address" --block &
fi

# Two minutes before the end Slurm sends Ctrl-C's signal to this script alone (B:), which passes it on: what was measured
# is fetched, and the next job continues. Ray's steps get none. Without `set -m` bash has a background command ignore it.
set -m
fpxbench fleet run --builds "$builds" --address "$address" "$@" &
driver=$!
trap 'kill -INT "$driver"' INT
wait "$driver" || wait "$driver"        # the signal interrupts the first

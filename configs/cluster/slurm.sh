#!/usr/bin/env bash
# Slurm: one run on a Ray cluster that lives as long as the job.
#
#   sbatch configs/cluster/slurm.sh configs/llama-3.3-70b.yaml --store.root /shared/runs --model.id /shared/models/...
#
# Three minutes before its time is up, the run ends in order and the job queues again: it resumes by itself.
# Environment: an activated virtual environment (or PYTHON=/path/to/python) that all nodes see. See docs/cluster.md.
#
#SBATCH --job-name=personaspace
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=personaspace-%j.log
set -euo pipefail

if (($# == 0)); then
  echo "usage: sbatch slurm.sh CONFIG [FLAGS]" >&2
  exit 2
fi
python=${PYTHON:-python}
interrupted=130

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
on_head=(--nodes=1 --ntasks=1 --nodelist="$head")
address=$(srun "${on_head[@]}" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 10000))
export RAY_ADDRESS="$address:$port"
# Others have jobs on this network: only who knows the token may join or submit.
RAY_AUTH_TOKEN=$("$python" -c "import secrets; print(secrets.token_hex(32))")
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

start=("$python" -m ray.scripts.scripts start --block "--temp-dir=/tmp/ray-$SLURM_JOB_ID"
  "--num-cpus=${SLURM_CPUS_PER_TASK:-$(nproc)}" "--num-gpus=${SLURM_GPUS_ON_NODE:-0}")
srun "${on_head[@]}" "${start[@]}" --head "--node-ip-address=$address" "--port=$port" &
steps=($!)
if ((${#nodes[@]} > 1)); then
  others=$((${#nodes[@]} - 1))
  srun --nodes="$others" --ntasks="$others" --exclude="$head" "${start[@]}" "--address=$RAY_ADDRESS" &
  steps+=($!)
fi
# srun hands the signal on to `ray start`, which ends what it started.
trap 'kill "${steps[@]}" 2>/dev/null || true; wait' EXIT

# Late nodes are used, too; this only keeps the run from beginning with none.
"$python" - "${#nodes[@]}" <<'PYTHON'
import logging, sys, time
import ray

deadline = time.monotonic() + 300
while True:
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
        while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]) and time.monotonic() < deadline:
            time.sleep(1)
        break
    except ConnectionError:
        if time.monotonic() > deadline:
            raise
        time.sleep(2)
print(sum(node["Alive"] for node in ray.nodes()), "of", sys.argv[1], "nodes are there", flush=True)
PYTHON

"$python" -m personaspace run "$@" &
driver=$!
trap 'kill -TERM "$driver"' TERM
code=0
wait "$driver" || code=$?
while kill -0 "$driver" 2>/dev/null; do # the signal ended `wait`, not the driver
  code=0
  wait "$driver" || code=$?
done
trap - TERM
if ((code == interrupted)); then
  echo "out of time: the job queues again, and the run resumes"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

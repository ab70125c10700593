#!/bin/bash
# Train on a SLURM cluster, over as many jobs as it takes:
#
#   sbatch [--nodes N] tools/slurm.sh CONFIG RUN [key=value ...]
#
# SLURM warns five minutes before the time limit; every process then saves at the same step and ends, and the job puts
# itself back in the queue. RUN/STATUS.json decides: done ends, failed ends with an error, preempted continues. A job
# that crashed or was killed without notice (a process or node lost, out of memory) continues at most MAX_KILLS times.
# scancel ends it.
# Adapt the lines below to your cluster. PYTHON, GPUS (per node), PORT and MAX_KILLS may be set in the environment.
#
#SBATCH --job-name=nitro-e
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log

set -uo pipefail

usage="usage: sbatch tools/slurm.sh CONFIG RUN [key=value ...]"
config=${1:?$usage}
run=${2:?$usage}
shift 2

python=${PYTHON:-.venv/bin/python}
gpus=${GPUS:-${SLURM_GPUS_ON_NODE:-8}}
port=${PORT:-$((20000 + SLURM_JOB_ID % 20000))}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
status=$run/STATUS.json

read_status() { cat "$status" 2>/dev/null || true; }
field() { "$python" -c 'import json, sys; print(json.loads(sys.argv[1]).get(sys.argv[2], ""))' "$1" "$2"; }

launch=(
    "$python" -m torch.distributed.run
    --nnodes "$SLURM_NNODES" --nproc-per-node "$gpus" --max-restarts 0
    --rdzv-backend c10d --rdzv-endpoint "$head:$port" --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
)
# Without these two, torchrun dies of SIGUSR1 itself, and kills its workers 30 s after any signal (docs/training.md).
options=$("$python" -m torch.distributed.run --help)
if grep -q -- --signals-to-handle <<<"$options"; then
    launch+=(--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1)
else
    echo "warning: this torch has no torchrun --signals-to-handle; submit with --signal=TERM@300 instead of USR1" >&2
fi
if grep -q -- --shutdown-timeout <<<"$options"; then
    launch+=(--shutdown-timeout 280)
else
    echo "warning: this torch has no torchrun --shutdown-timeout; a checkpoint must be written within 30 s" >&2
fi

trap 'echo "signal: waiting for the checkpoint"' TERM USR1 # the shell itself must outlive the warning
before=$(read_status)
srun --kill-on-bad-exit=0 --wait=900 "${launch[@]}" train.py "$config" run="$run" "$@"
code=$?
now=$(read_status)

if [[ -z $now || $now == "$before" ]]; then
    echo "training did not start (exit code $code); see the message above" >&2
    exit $((code ? code : 1))
fi
state=$(field "$now" state)
echo "$run: $state at step $(field "$now" step)"
case $state in
done) exit 0 ;;
preempted) ;;
running | crashed)
    if ((${SLURM_RESTART_COUNT:-0} >= ${MAX_KILLS:-20})); then
        echo "$state without notice and restarted $SLURM_RESTART_COUNT times already: giving up" >&2
        exit 1
    fi
    ;;
*) exit $((code ? code : 1)) ;;
esac
if [[ $(squeue --noheader --job "$SLURM_JOB_ID" --format %T) == RUNNING ]]; then # not so after scancel
    scontrol requeue "$SLURM_JOB_ID"
fi

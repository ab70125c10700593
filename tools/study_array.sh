#!/bin/bash
# Train a study on a SLURM cluster, each of its trainings as a task of an array job of its own GPU:
#
#   n=$(nitro-e study STUDY.yaml --list | wc -l)
#   sbatch --array=0-$((n - 1)) tools/study_array.sh STUDY.yaml [key=value ...]
#   nitro-e study STUDY.yaml [key=value ...]      afterwards: scores what is trained, writes the tables
#
# SLURM warns five minutes before the time limit; the training saves and ends, and the task puts itself back in the
# queue, where it goes on. Trainings of equal seconds follow when those at the recipes' steps are done: the last command.
# Adapt the lines below to your cluster. PYTHON may be set in the environment.
#
#SBATCH --job-name=nitro-e-study
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A-%a.log

set -uo pipefail

study=${1:?usage: sbatch --array=0-N tools/study_array.sh STUDY.yaml [key=value ...]}
shift

"${PYTHON:-.venv/bin/python}" -m nitro_e.cli study "$study" "$@" --run "$SLURM_ARRAY_TASK_ID" &
command=$! warned=
trap 'warned=1; kill -USR1 "$command"' USR1
wait "$command"
code=$?
# a signal ends the first wait; only the second tells how the command ended
if [[ -n $warned ]]; then
    wait "$command"
    code=$?
fi
# 130: interrupted and saved
if ((code == 130)) && [[ $(squeue --noheader --job "$SLURM_JOB_ID" --format %T) == RUNNING ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

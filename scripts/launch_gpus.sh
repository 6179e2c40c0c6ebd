#!/usr/bin/env bash
# Train a recipe on the GPUs of this machine, one process each.
#
#   scripts/launch_gpus.sh [-n PROCESSES] RECIPE [KEY=VALUE ...] [--resume|--fresh]
#
# PROCESSES is left out: as many as there are GPUs. Works with and without `backend: deepspeed` in the recipe.
set -euo pipefail

count=""
if [ "${1:-}" = "-n" ]; then
    count="$2"
    shift 2
fi
if [ $# -eq 0 ]; then
    sed -n '2,6s/^# \{0,1\}//p' "$0"
    exit 2
fi
if [ -z "$count" ]; then
    count=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
    if [ "$count" -eq 0 ]; then
        echo "no GPU found; give the number of processes with -n" >&2
        exit 2
    fi
fi
exec python -m torch.distributed.run --standalone --nproc_per_node "$count" -m peftctl train "$@"

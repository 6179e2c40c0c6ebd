#!/usr/bin/env bash
# Train a recipe through accelerate's launcher.
#
#   scripts/launch_accelerate.sh [-n PROCESSES] RECIPE [KEY=VALUE ...] [--resume|--fresh]
#
# The recipe decides about precision and DeepSpeed: leave both out of accelerate's own configuration.
# PROCESSES is left out: as many as there are GPUs. For several machines add accelerate's variables or use
# launch_nodes.sh.
set -euo pipefail

count=""
if [ "${1:-}" = "-n" ]; then
    count="$2"
    shift 2
fi
if [ $# -eq 0 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0"
    exit 2
fi
if [ -z "$count" ]; then
    count=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
    if [ "$count" -eq 0 ]; then
        echo "no GPU found; give the number of processes with -n" >&2
        exit 2
    fi
fi
several=()
if [ "$count" -gt 1 ]; then
    several=(--multi_gpu)
fi
exec python -m accelerate.commands.launch "${several[@]}" --num_processes "$count" \
    --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0 -m peftctl train "$@"

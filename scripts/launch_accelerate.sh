#!/usr/bin/env bash
# Train a recipe through accelerate's launcher.
#
#   scripts/launch_accelerate.sh [-n PROCESSES] RECIPE [KEY=VALUE ...] [--resume|--fresh]
#
# The recipe decides about precision and DeepSpeed: leave both out of accelerate's own configuration.
# PROCESSES is left out: as many as there are GPUs. For several machines add accelerate's variables or use
# launch_nodes.sh.
set -euo pipefail

# shellcheck source=scripts/_processes.sh
source "$(dirname "${BASH_SOURCE[0]}")/_processes.sh"
several=()
if [ "$count" -gt 1 ]; then
    several=(--multi_gpu)
fi
exec python -m accelerate.commands.launch "${several[@]}" --num_processes "$count" \
    --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0 -m peftctl train "$@"

#!/usr/bin/env bash
# Train a recipe on the GPUs of this machine, one process each.
#
#   scripts/launch_gpus.sh [-n PROCESSES] RECIPE [KEY=VALUE ...] [--resume|--fresh]
#
# PROCESSES is left out: as many as there are GPUs. Works with and without `backend: deepspeed` in the recipe.
set -euo pipefail

# shellcheck source=scripts/_processes.sh
source "$(dirname "${BASH_SOURCE[0]}")/_processes.sh"
exec python -m torch.distributed.run --standalone --nproc_per_node "$count" -m peftctl train "$@"

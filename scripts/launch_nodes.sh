#!/usr/bin/env bash
# Train a recipe on several machines through DeepSpeed's launcher.
#
#   scripts/launch_nodes.sh HOSTFILE RECIPE [KEY=VALUE ...] [--resume|--fresh]
#
# HOSTFILE has a line a machine, `name slots=GPUS`; the processes meet on the first. Each is reached by ssh without a
# password. All have this environment, and the data and train.output_dir at the same paths; train.output_dir lies on
# storage that they share. What has to be set on every machine goes into .deepspeed_env, a line NAME=VALUE each.
set -euo pipefail

if [ $# -lt 2 ]; then
    sed -n '1d; /^#/!q; s/^# \{0,1\}//p' "$0"
    exit 2
fi
if [ ! -f "$1" ]; then
    echo "$1: no such host file" >&2
    exit 2
fi
hosts="$1"
shift
first=$(awk '!/^#/ && NF { print $1; exit }' "$hosts")
exec python -m deepspeed.launcher.runner --hostfile "$hosts" --no_ssh_check --master_addr "$first" --module peftctl train "$@"

# Sourced by the launch scripts of one machine: [-n PROCESSES] RECIPE ... -> $count, and "$@" without -n.
# Without -n there are as many processes as GPUs. The comment at the script's head is its help.

count=""
if [ "${1:-}" = "-n" ]; then
    count="$2"
    shift 2
fi
if [ $# -eq 0 ]; then
    sed -n '1d; /^#/!q; s/^# \{0,1\}//p' "$0"
    exit 2
fi
if [ -z "$count" ]; then
    count=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
    if [ "$count" -eq 0 ]; then
        echo "no GPU found; give the number of processes with -n" >&2
        exit 2
    fi
fi

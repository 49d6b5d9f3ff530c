#!/usr/bin/env bash
# Train on several machines without a scheduler: give the same command on each of them.
#
#   launch/torchrun.sh NODES HOST[:PORT] OPTIONS...      e.g.
#   launch/torchrun.sh 2 node0:29500 net.width=4096 engine=deepspeed engine.zero_stage=3
#
# HOST is one of the machines, which all can reach. Ranks on each: the number of its GPUs, or RANKS=4. A machine that is
# lost is replaced by giving the command on another one; RESTARTS says how often the ranks start again (default 3), each
# time from the last checkpoint, so run.root or run.dir must be on a disk that all machines share. A path that does not
# begin with / is taken from the top folder of this checkout. Ctrl-C, SIGTERM or SIGUSR2 to this command, on each machine,
# reach the ranks, which save and end; they have 120 s for it.
set -euo pipefail

if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]] || [[ $2 == *=* ]]; then
    printf 'usage: %s NODES HOST[:PORT] OPTIONS...  (the same on every machine; --help of launch/train.py has the options)\n' "$0" >&2
    exit 2
fi
nodes=$1 host=$2
shift 2
[[ ! $host =~ ^([^]:[]+|\[.*\])$ ]] || host=$host:29500

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$(command -v -- "$python")" ] || { printf 'error: %s: expected an interpreter, found none; make setup, or PYTHON=...\n' "$python" >&2; exit 2; }
ranks=${RANKS:-$("$python" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}

# What this machine is called where the others are, and whether HOST is one of its addresses: torchrun tells the others its
# name, which many systems themselves take for 127.0.1.1.
known=$("$python" -I alignscale/address.py "$host") || exit 2
read -r own here <<< "$known"

# Of several of these commands on one machine, say to try it out, one holds the place where they meet.
place=${TMPDIR:-/tmp}/alignscale-$UID-$(stat -Lc %i /proc/self/ns/net 2> /dev/null || true)-${host//[^0-9A-Za-z.]/_}.lock
if [ -n "$here" ] && { exec 9>> "$place"; } 2> /dev/null; then
    flock --nonblock 9 2> /dev/null || [ $? -ne 1 ] || here=false
fi

# A store that torchrun shares with the ranks outlives none of them when one is killed.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

[ "$nodes" -eq 1 ] || printf 'waiting for %s machines at %s\n' "$nodes" "$host" >&2
exec "$python" -m torch.distributed.run --nnodes="$nodes" --nproc-per-node="$ranks" --max-restarts="${RESTARTS:-3}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2 --shutdown-timeout=120 \
    ${own:+--local-addr="$own"} ${here:+--rdzv-conf=is_host="$here"} --rdzv-backend=c10d --rdzv-endpoint="$host" \
    --rdzv-id="${RUN_ID:-alignscale}" launch/train.py "$@"

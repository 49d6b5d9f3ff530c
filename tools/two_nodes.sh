#!/usr/bin/env bash
# Two machines on one: runs a Python script under torchrun as two nodes of one rank each, in network namespaces of their
# own that a link of so many bits a second joins. Needs root, or a user namespace (unshare -r tools/two_nodes.sh ...), and
# ip and tc of iproute2 with the kernel's tbf.
#
#     tools/two_nodes.sh 1gbit tools/bench_step.py --distributed --parallel-width 2 --net mlp --width 4096 --batch 256
set -euo pipefail

if [ -z "${TWO_NODES:-}" ]; then
    [ $# -ge 2 ] || { echo "usage: tools/two_nodes.sh RATE SCRIPT [ARGUMENTS]; RATE as tc has it: 1gbit, 200mbit" >&2; exit 2; }
    TWO_NODES=1 exec unshare --net -- "$0" "$@"
fi

rate=$1
shift
run=("${PYTHON:-.venv/bin/python}" -m torch.distributed.run --nnodes=2 --nproc-per-node=1
    --master-addr=10.94.0.1 --master-port=29400)
ip link set lo up
unshare --net sleep infinity &
other=$!
trap 'kill $(jobs -p)' EXIT
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link add link0 type veth peer name link1 netns "$other"
ip addr add 10.94.0.1/24 dev link0
ip link set link0 up
there=(nsenter --target "$other" --net)
"${there[@]}" ip link set lo up
"${there[@]}" ip addr add 10.94.0.2/24 dev link1
"${there[@]}" ip link set link1 up
tc qdisc add dev link0 root tbf rate "$rate" burst 256kb latency 100ms
"${there[@]}" tc qdisc add dev link1 root tbf rate "$rate" burst 256kb latency 100ms
GLOO_SOCKET_IFNAME=link1 "${there[@]}" "${run[@]}" --node-rank=1 "$@" &
GLOO_SOCKET_IFNAME=link0 "${run[@]}" --node-rank=0 "$@"
wait $!

#!/usr/bin/env bash
# Makes one Ray cluster of the machines that run this, and a command its driver:
#
#   together.sh RANK NODES HEAD:PORT COMMAND…
#
# Rank 0 starts the head, waits until NODES machines are there, and runs the command; its exit code is the command's, or
# 75 where the machines did not come. The others serve until the head is gone. Only what was started here is stopped,
# for SkyPilot has a Ray of its own on the same machines. RAY_AUTH_TOKEN must be the same everywhere.
set -euo pipefail
rank=$1 nodes=$2 head=$3
shift 3
# shellcheck source=infra/ray/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
: "${RAY_AUTH_TOKEN:?together.sh: set RAY_AUTH_TOKEN, the same on every machine}"
export RAY_ADDRESS=$head RAY_gcs_rpc_server_reconnect_timeout_s=15
options=(--block --disable-usage-stats --object-store-memory=200000000) # receipts are all that passes through it
patience=600

if ((rank > 0)); then
    until (: </dev/tcp/"${head%:*}"/"${head##*:}") 2>/dev/null; do
        ((patience-- > 0)) || exit 75
        sleep 1
    done
    ray start --address="$head" "${options[@]}" || true # the head's end is no failure of this machine
    exit 0
fi

ray start --head --node-ip-address="${head%:*}" --port="${head##*:}" --include-dashboard=false "${options[@]}" &
ray=$!
trap 'kill "$ray" 2>/dev/null || true; wait "$ray" || true' EXIT
python3 - "$nodes" "$patience" <<'PYTHON' || exit 75
import sys, time
import ray

nodes, patience = map(int, sys.argv[1:])
for _ in range(patience):
    try:
        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level="ERROR")
        alive = sum(node["Alive"] for node in ray.nodes())
    except Exception:  # the head is still starting
        alive = 0
    if alive >= nodes:
        sys.exit(0)
    time.sleep(1)
sys.exit(f"together.sh: {alive} of {nodes} machines came within {patience} s")
PYTHON
trap ':' TERM # who ends a step tells all of its processes: the command ends by itself, and says how
"$@"

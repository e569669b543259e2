#!/usr/bin/env bash
# Joins the machines that run this script into one Ray cluster and runs a command as its driver:
#
#   together.sh RANK NODES HEAD:PORT COMMAND…
#
# Rank 0 starts the head, waits for NODES machines, and runs the command. It returns the command's exit code, or 75 if
# the machines did not join. The other ranks work until the head is gone. The script stops only the Ray that it started,
# because SkyPilot runs its own Ray on the same machines. RAY_AUTH_TOKEN must be the same on every machine.
set -euo pipefail
rank=$1 nodes=$2 head=$3
shift 3
# shellcheck source=infra/ray/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
: "${RAY_AUTH_TOKEN:?together.sh: set RAY_AUTH_TOKEN, the same on every machine}"
export RAY_ADDRESS=$head RAY_gcs_rpc_server_reconnect_timeout_s=15
options=(--block --disable-usage-stats --object-store-memory=200000000) # only receipts pass through the object store
patience=600

if ((rank > 0)); then
    until (: </dev/tcp/"${head%:*}"/"${head##*:}") 2>/dev/null; do
        ((patience-- > 0)) || exit 75
        sleep 1
    done
    ray start --address="$head" "${options[@]}" || true # the end of the head is not an error on this machine
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
trap ':' TERM # Slurm signals every process of a step: the command ends by itself and returns its own exit code
"$@"

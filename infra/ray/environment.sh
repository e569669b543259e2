# shellcheck shell=bash
# Source this in every shell that starts Ray or connects to it. It puts mergeyard's programs first on PATH and makes Ray
# require a token. With these health checks, Ray gives the work of an unreachable node to another node within 20 s. With
# Ray's defaults this takes 7 minutes. All nodes need the same values.
PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/.venv/bin:$PATH"
export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0
export RAY_health_check_initial_delay_ms=1000
export RAY_health_check_period_ms=1000
export RAY_health_check_timeout_ms=2000
export RAY_health_check_failure_threshold=3
export RAY_grpc_client_keepalive_time_ms=10000
export RAY_grpc_client_keepalive_timeout_ms=5000

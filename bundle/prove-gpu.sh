#!/bin/sh
# Tests and measures the service on a CUDA device in at most nine minutes: bundle/prove-gpu.sh [OUTPUT]
# --dry-run runs a short form of every step on the CPU. Run it in an installation, or a checkout with .venv.
set -eu
output=$(pwd)/gpu-results
case ${1:-} in
  "" | --*) ;;
  *) output=$1; shift ;;
esac
mkdir -p "$output"
output=$(cd "$output" && pwd)
cd "$(dirname "$0")/.."
exec .venv/bin/python -m benchmarks.prove_gpu "$output" "$@"

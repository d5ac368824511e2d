#!/bin/sh
# Proves and measures the service on a CUDA device in at most nine minutes: bundle/prove-gpu.sh [OUTPUT]
# --dry-run runs every step in short on the CPU. Run in what install.sh made, or in a checkout with .venv.
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

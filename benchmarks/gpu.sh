#!/bin/sh
# Trials in a bank against peft one after the other, on one GPU, in under 9 minutes. The figures go to gpu.json in $OUT or
# in the current folder. `gpu.sh --smoke` only shows that it runs, with tiny models, also on a CPU.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
out=${OUT:-$PWD}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "${PYTHON:-python3}" "$root/benchmarks/gpu.py" --out "$out/gpu.json" "$@"

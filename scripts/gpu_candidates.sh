#!/usr/bin/env bash
# What nobody has measured yet, on a machine with an NVIDIA GPU, the cheapest first; each step has a limit of its own.
#
#   scripts/gpu_candidates.sh [--dry-run] [STEP ...]
#
#   candidates   instances for states and trees beside the defaults, checked, then timed        150 s
#   tests        int8 products with one scale a token, prompts of a mixer                        90 s
#   prompt       a prompt of 4096 tokens through Mamba2-2.7B, int8 beside bf16                    90 s
#   products     launches of 4-bit products with 32 to 128 tokens beside the default             110 s
#   steps        a step of Mamba2-2.7B, launches that overlap too, and what a layer's time is    120 s
#   dense        dense products beside humming-kernels, where they are installed                 120 s
#
# All of them by default, in this order. Results are JSON files in $OUT (default: benchmarks). Needs what gpu_check.sh needs.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-benchmarks}
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_INTERPRET=0 TRITON_DEFAULT_FP_FUSION=1 PYTHONUNBUFFERED=1
dry=()
if [ "${1:-}" = "--dry-run" ]; then
  dry=(echo)
  shift
fi
if [ $# -eq 0 ]; then
  set -- candidates tests prompt products steps dense
fi
run=("$python" kernels/bench/gpu_run.py --seconds 100)
status=0
for step in "$@"; do
  began=$SECONDS
  case $step in
    candidates) command=(timeout 150 "$python" kernels/bench/gpu_candidates.py --only states,trees --out "$out/candidates.json") ;;
    tests) command=(timeout 90 "$python" -m pytest -q -m gpu tests/kernels/test_gpu_run.py -p no:cacheprovider -o addopts= -k "one_scale or prompt_of") ;;
    prompt) command=(timeout 90 "${run[@]}" --only mamba --match prompt --out "$out/prompt.json") ;;
    products) command=(timeout 110 "$python" kernels/bench/gpu_candidates.py --only products --out "$out/products.json") ;;
    steps) command=(timeout 120 "${run[@]}" --only mamba --early --match "batch (1|64|16|128)\$" --out "$out/steps.json") ;;
    dense) command=(timeout 120 "${run[@]}" --only dense --match "w[34] [18] tokens" --out "$out/dense.json") ;;
    *)
      echo "no step $step"
      exit 2
      ;;
  esac
  "${dry[@]}" "${command[@]}" || status=$?
  echo "$step: $((SECONDS - began)) s"
done
exit "$status"

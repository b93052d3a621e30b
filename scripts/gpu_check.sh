#!/usr/bin/env bash
# All GPU tests and benches on a machine with an NVIDIA GPU, in under 10 minutes; writes JSON files into benchmarks/.
#
#   scripts/gpu_check.sh [--dry-run] [ARGUMENTS OF kernels/bench/gpu_run.py]
#
# e.g. `TESTS=cuda scripts/gpu_check.sh --only moe,dense --match "w4 .* 8 tokens" --out FILE` for a part of it; TESTS is what
# pytest's -k takes.
# Needs python3 with torch >= 2.11, triton >= 3.6, numpy and pytest; nothing of this project has to be installed. With
# pytest-xdist the tests run side by side; without it they may not end within their limit. With transformers a Mamba-2 with
# packed states is followed token by token as well (scripts/check_gpu_decode.py).
# Compared with where they are installed: humming-kernels, gemlite (pip install humming-kernels gemlite).
# --dry-run checks the imports and lists what would run; it needs no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_INTERPRET=0 TRITON_DEFAULT_FP_FUSION=1 PYTHONUNBUFFERED=1

if [ "${1:-}" = "--dry-run" ]; then
  "$python" -m pytest -q -m gpu tests/kernels/test_gpu_run.py --collect-only -p no:cacheprovider -o addopts=
  exec "$python" kernels/bench/gpu_run.py "$@"
fi

"$python" - <<'PY' || { echo "no GPU that torch can use"; exit 1; }
import sys, torch
sys.exit(0 if torch.cuda.is_available() else 1)
PY
name=$("$python" -c 'import torch; print("".join(c if c.isalnum() else "_" for c in torch.cuda.get_device_name().lower()))')
status=0
# most of the tests' time is compilation: side by side where pytest-xdist is installed
parallel=$("$python" -c 'import xdist' 2>/dev/null && echo "-n 8" || true)
# shellcheck disable=SC2086
timeout 150 "$python" -m pytest -q -m gpu tests/kernels/test_gpu_run.py -p no:cacheprovider -o addopts= -k "${TESTS:-}" $parallel || status=$?
if "$python" -c 'import transformers' 2>/dev/null; then
  timeout 60 "$python" scripts/check_gpu_decode.py --types float32 bfloat16 --tokens 24 --out "benchmarks/mamba_decode_${name}.json" || status=$?
fi
timeout 340 "$python" kernels/bench/gpu_run.py --seconds 300 --out "benchmarks/gpu_${name}.json" "$@" || status=$?
echo "total: ${SECONDS} s"
exit "$status"

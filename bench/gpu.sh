#!/usr/bin/env bash
# Validates and measures the CUDA backend on a machine with a GPU, in one call of at most 10 minutes
# and without a network: builds for the GPU that is there, runs the tests that need it, runs the
# kernel tests under compute-sanitizer, and measures (bench/gpu.py writes the table and gpu.json).
# Needs torch, nvcc, cmake, ninja, pybind11, setuptools and pytest. Exits 3 without a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu.json}

if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: no CUDA device (or a torch without CUDA): nothing to validate" >&2
  exit 3
fi
capability=$(python -c 'import torch; print(*torch.cuda.get_device_capability(), sep="")')
case $capability in
  90) arch=90a-real ;;
  *) arch=$capability-real ;;
esac

export PATH=$PATH:/usr/local/cuda/bin
MTP_FAST_CUDA=1 MTP_FAST_CUDA_ARCHS=$arch pip install -q --no-build-isolation --no-deps -e .
python -m pytest -q -m cuda
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    timeout 120 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      python -m pytest -q -x -m cuda tests/test_cuda_cross_entropy.py tests/test_cuda_acceptance.py \
      -k 'vocab=1003 or vocab=49152 or vocab=20011'
  done
else
  echo "gpu.sh: compute-sanitizer is not installed: memcheck and racecheck are left out" >&2
fi
if command -v ncu >/dev/null; then  # needs the right to read counters, which not every host gives
  timeout 60 ncu --kernel-name 'regex:cross_entropy_(gradient_)?kernel' --launch-count 3 \
    --metrics dram__throughput.avg.pct_of_peak_sustained_elapsed,gpu__time_duration.sum \
    python -m pytest -q -m cuda tests/test_cuda_cross_entropy.py -k vocab=128256 ||
    echo "gpu.sh: ncu did not run: its metrics are left out" >&2
fi
timeout 280 python bench/gpu.py "$out"

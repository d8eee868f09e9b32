#!/usr/bin/env bash
# All tables: accuracy, then speed and memory. Arguments go to speed.py.
# usage: run.sh [PYTHON] [ARGUMENTS]     (default: python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python=${1:-python3}
"$python" accuracy.py
echo
"$python" speed.py "${@:2}"

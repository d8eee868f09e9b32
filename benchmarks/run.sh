#!/usr/bin/env bash
# All tables: accuracy, then speed and memory. --quick sees that they run; --gigapixel and --runs N go to speed.py.
# usage: run.sh [PYTHON] [--quick | ARGUMENTS]     (default: python3)
set -euo pipefail
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${1:-python3}
quick=
[ "${2:-}" != --quick ] || quick=--quick
"$python" "$folder/accuracy.py" $quick
echo
"$python" "$folder/speed.py" "${@:2}"

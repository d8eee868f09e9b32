#!/bin/sh
# Demonstration: remove the gradient of a drawn sky. Writes sky_out.tif and sky_background.tif beside this script.
# usage: test_sky_image.sh [PYTHON]     (default: the python of .venv beside this script, or else python3)
set -eu
cd "$(dirname "$0")"
python=${1:-.venv/bin/python}
command -v "$python" > /dev/null || python=python3

xargs "$python" rmgradient.py -i test_data/sky.tif -o sky_out.tif -b sky_background.tif --overwrite -p < test_data/skypoints
ls -l sky_out.tif sky_background.tif

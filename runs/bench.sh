#!/bin/sh
# The commands behind bench/results and docs/roofline.svg. About half an hour on two cores; 16 GB of memory for the
# peers at 8,192 tokens (those that do not fit are left out, and said so).
#
#   pip install . torch==2.13.0 onnx onnxruntime openvino nncf matplotlib
#   [QUIET="chrt -f 5"] runs/bench.sh
#
# QUIET is put before every command that measures: whatever keeps other work off the machine for some minutes.
set -eu
cd "$(dirname "$0")/.."
bench() { ${QUIET:-} python bench/bench.py "$@" --threads 2; }

python bench/bench.py prepare
bench peaks
bench tune
bench run --rounds 5
bench long
for cap in avx512vnni avx2; do
    peers="ov ov-cls ort-int8 ort-int8-cls torch"
    bench tune --cap $cap --peers ov ov-cls ort-int8 ort-int8-cls --sizes 1 4 8
    bench run --cap $cap --peers $peers --rounds 3
    bench long --cap $cap --peers ov
done
bench text --rounds 3
python bench/bench.py report

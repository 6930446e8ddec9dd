#!/bin/sh
# The commands behind bench/results and docs/roofline.svg. About an hour on two cores; 23 GB of memory for the
# peers at 8,192 tokens (those that do not fit are left out, and said so).
#
#   pip install . torch==2.13.0 transformers onnx onnxruntime openvino nncf matplotlib
#   [QUIET="chrt -f 5"] runs/bench.sh
#
# QUIET is put before every command that measures: whatever keeps other work off the machine for some minutes.
set -eu
cd "$(dirname "$0")/.."
bench() { ${QUIET:-} python bench/bench.py "$@" --threads 2; }

python bench/bench.py prepare
bench peaks
bench tune
bench run --rounds 3
bench long --precisions int8 --peers ov ov-cls torch
bench text --rounds 3
python bench/bench.py prepare-families
bench families --rounds 1 --families ms-marco-MiniLM-L-6-v2 ettin-reranker-17m-v1
bench families --rounds 1 --families mxbai-rerank-xsmall-v1 bge-reranker-base --sizes 4
bench families --rounds 1 --families gte-reranker-modernbert-base --sizes 4 --family-workloads ragged 8x512 1x64
# 22 layers at 8,192 tokens take the peers minutes, and ONNX Runtime more than 23 GB.
bench families --rounds 1 --families gte-reranker-modernbert-base --sizes 32 --family-workloads 1x8192
bench catalog --rounds 1
bench gemms
# ONNX Runtime as if it had AVX2: where the processor cannot trap CPUID, this needs objdump (binutils).
bench tune --cap avx2 --peers ov-cls ov --sizes 1 4 --workloads 32x128 8x512 1x64 ragged
bench tune --cap avx2 --peers ort-int8 ort-int8-cls --sizes 1 4 8 --workloads 32x128 8x512 1x64 ragged
bench tune --cap avx2 --peers ort --sizes 1 4 8 --workloads 32x128 8x512 1x64
bench run --cap avx2 --precisions int8 --peers ov ov-cls torch ort ort-int8 ort-int8-cls --rounds 2 \
  --workloads 32x128 8x512 1x64 ragged
python bench/bench.py report
# On a machine with a CUDA GPU (the first where ours in fp32 is quick, the others there):
#   python bench/gpu.py exact exact.npz && python bench/gpu.py run exact.npz --out gpu.json && python bench/gpu.py report gpu.json

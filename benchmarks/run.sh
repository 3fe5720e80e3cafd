#!/usr/bin/env bash
# Measures everything that performance is promised for and writes it, with pictures and the table of targets:
#
#     benchmarks/run.sh [FOLDER]          (default: benchmarks/results)
#
# About 25 minutes on two cores; let nothing else run. PYTHON is an interpreter with convoxel[bench] (default: python3;
# a virtual environment of `pip install ".[bench]"` will do). ONLY="hot network-nnunet3d" measures those files again.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
python=${PYTHON:-python3}
mkdir -p "$out"

# measure NAME WORDS…: `convoxel bench WORDS` to NAME.json, NAME.png and, of layers, NAME-roofline.png; a promise broken
# by accuracy is not the end
files=()
measure() {
  local name=$1 start=$SECONDS status=0 roofline=()
  files+=("$out/$name.json")
  shift
  if [[ -n ${ONLY:-} && " $ONLY " != *" $name "* ]]; then return; fi
  if [[ $1 == layers ]]; then roofline=(--roofline "$out/$name-roofline.png"); fi
  echo "== $name: convoxel bench $*"
  "$python" -m convoxel bench "$@" --json "$out/$name.json" --plot "$out/$name.png" "${roofline[@]}" || status=$?
  echo "== $name: $((SECONDS - start)) s, exit code $status"
  if [[ $1 != accuracy && $status != 0 ]]; then exit "$status"; fi
}

rest=(first stride transposed deep depthwise pointwise conv2d)

measure hot layers hot --peers torch,compile --repeats 3
measure hot-highest layers hot --precision highest --repeats 2
measure hot-bf16 layers hot --dtype bf16 --repeats 2
measure layers layers "${rest[@]}" --repeats 3
measure around layers around small --repeats 3
measure avx2-hot layers hot --isa avx2 --repeats 2
measure avx2-layers layers "${rest[@]}" --isa avx2 --repeats 2
measure avx2-around layers around --isa avx2 --repeats 2
measure network-nnunet3d network nnunet3d --dtype f32,bf16 --peers compile,onnxruntime,openvino --rounds 1 --repeats 1
measure network-nnunet2d network nnunet2d --rounds 1 --repeats 2
measure network-basicunet network basicunet --rounds 1 --repeats 2
measure network-dynunet network dynunet --rounds 1 --repeats 1
measure network-segresnet network segresnet --rounds 1 --repeats 2
measure avx2-network-nnunet3d network nnunet3d --size 96,96,96 --isa avx2 --rounds 1 --repeats 1
measure scaling scaling --repeats 2
measure accuracy accuracy
measure accuracy-bf16 accuracy --dtype bf16

measured=()
for file in "${files[@]}"; do [[ -e $file ]] && measured+=("$file"); done
"$python" -m convoxel bench targets "${measured[@]}" | tee "$out/targets.md"

#!/usr/bin/env bash
# The figures of a GPU, in at most 8 minutes: bash benchmarks/gpu.sh FOLDER [--dry]
# FOLDER gets a log of each step, the figures as JSON, and table.md. A step that fails or takes too long is left behind.
# --dry: the same lines on a CPU with a tiny network, to see that each works. PYTHON: .venv/bin/python unless set.
# ESC10=ESC-10_FOLDER: in their place the accuracy of the full network in float32 and bfloat16, three seeds, on fold 4.
set -uo pipefail
usage="usage: bash benchmarks/gpu.sh FOLDER [--dry]"
case ${1:-} in "" | -*) echo "$usage" >&2 && exit 2 ;; esac
case ${2:-} in
    --dry) ;;
    "") command -v nvidia-smi > /dev/null || { echo "There is no GPU here: use --dry" >&2 && exit 2; } ;;
    *) echo "$usage" >&2 && exit 2 ;;
esac
folder=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
ESC10=${ESC10:+$(realpath "$ESC10")}
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" > /dev/null || python=python3
store=$(mktemp -d "${TMPDIR:-/tmp}/clips.XXXXXX")
trap 'rm -rf "$store"' EXIT

if [ "${2:-}" = --dry ]; then
    batch=4 plain=1 clips=24 workers=1 steps=2 slower=20
    trainer=(--tiny) compile=off
    small=(--htsat_size tiny --max_epoch 1 --debug True) seeds=1
    network=(--accelerator cpu --clip_samples 8000 --htsat_dim 16 --htsat_depth 1,1 --htsat_num_head 1,2 --htsat_spec_size 64 --mel_bins 32)
    samples=8000
else
    batch=128 plain=64 clips=${CLIPS:-20000} workers=8 steps=40 slower=1
    trainer=() compile=default network=() samples=320000
    small=(--max_epoch 30) seeds=1,2,3
fi

# step NAME SECONDS COMMAND...
step() {
    local name=$1 limit=$(($2 * slower)) began=$SECONDS status=0
    shift 2
    echo "== $name: $*"
    timeout -k 5 "$limit" "$@" > "$folder/$name.log" 2>&1 || status=$?
    tail -n 12 "$folder/$name.log"
    printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - began))" >> "$folder/steps.tsv"
}

: > "$folder/steps.tsv"
if [ -n "$ESC10" ]; then
    step prepare 60 "$python" main.py prepare --dataset_type esc-50 --raw "$ESC10" --workspace "$store"
    for precision in 32 bf16-mixed; do # side by side: writing checkpoints takes most of the time
        step "esc10-$precision" 400 "$python" main.py compare --dataset_type esc-50 --esc_fold 4 --encoders htsat \
            --workspace "$store/$precision" --dataset_path "$store/data/esc-50" --seeds $seeds --steps 0 \
            --precision $precision --batch_size 16 --save_top_k 1 --devices 1 "${small[@]}" &
    done
    wait
    for precision in 32 bf16-mixed; do
        cp "$store/$precision"/runs/comparison_*.md "$folder/$precision.md"
    done
    exit
fi
rm -f "$folder"/{trainer,triton,benchmark}.json
step machine 10 bash -c "nvidia-smi; lscpu; git rev-parse HEAD; $python -c 'import torch; print(torch.__version__)'"
# 12.8 GB of one block of clips, repeated: no clip is read twice in an epoch.
step store 45 "$python" -c "import sys; sys.path.insert(0, '.')
from pathlib import Path
from benchmarks.data_stores import write_repeated
write_repeated(Path('$store'), clips=$clips, clip_samples=$samples)"
step tests 45 "$python" -m pytest -q -p no:cacheprovider -m gpu $(grep -rl "mark\.gpu" tests)
step trainer 115 "$python" benchmarks/training.py --trainer "${trainer[@]}" --quick --batch $batch --steps $steps \
    --precision bf16-mixed --compile $compile --plain_batch $plain --json "$folder/trainer.json"
step triton 100 env HTSAT_TRITON_ATTENTION=1 "$python" benchmarks/training.py --trainer "${trainer[@]}" --quick \
    --batch $batch --steps $steps --precision bf16-mixed --compile $compile --json "$folder/triton.json"
step benchmark 165 "$python" main.py benchmark --dataset_type audioset --dataset_path "$store" --batch_size $batch \
    --devices 1 "${network[@]}" --precisions bf16-mixed --compile_modes $compile --steps $steps --num_workers $workers \
    --json "$folder/benchmark.json" --profile
"$python" benchmarks/gpu_table.py "$folder" | tee "$folder/table.md"

#!/usr/bin/env bash
# Train tinysd on a GPU that is lent for minutes and sees a copy of this working tree, without a network.
#
#   scripts/tinysd/device.sh prepare DATA   here, before: pack DATA and fetch the wheels, below build/device
#   scripts/tinysd/device.sh rehearse DATA  here, before: every line of this on two CPU cores, with a tiny setting
#   scripts/tinysd/device.sh train          there: ends within nine minutes; its state is in $OUT
#   scripts/tinysd/device.sh take FOLDER    here, after: what came back -> build/device/run/weights and .../tinysd
#
# A transfer of at most 64 MiB with the tree takes one shard (28 MiB) a call; what a call brought stays there while the
# machine is warm. So, one after the other at once, each with "carry":
#
#   true                                    carry build/device/pack/pack.json, build/device/pack/tokenizer,
#                                           build/device/wheels, build/device/pack/0 where that fits
#   true                                    carry build/device/pack/1          ... to the last but one
#   scripts/tinysd/device.sh train          carry build/device/pack/3 (the last); limit 560 s
#
# To go on with weights that came back, copy them to build/device/start (at most 55 MB: send it in a call of its own) and
# carry that too. VAE, SMALL and LARGE are the minutes of the stages; VAE=0 keeps the VAE of build/device/start.
# If the weights in the tree leave too little room, take a tree that holds scripts/ alone: git sparse-checkout set scripts.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=scripts/tinysd
python=${PYTHON:-python3}
device=${DEVICE:-build/device}

wheels() {
    mkdir -p "$device/wheels"
    version=$("$python" -c "import diffusers; print(diffusers.__version__)")
    "$python" -m pip download -q --no-deps --only-binary=:all: -d "$device/wheels" "diffusers==$version" importlib-metadata
}

prepare() {
    "$python" $here/photographs.py "$1" "$device/pack" ${PACK:-}
    wheels
    du -sm "$device"/pack/* "$device/wheels"
}

train() {
    local out=${OUT:-$device/out} run=$device/run site=${SITE:-/tmp/tinysd-site}
    mkdir -p "$out"
    "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$device"/wheels/*.whl
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
    local start=()
    if [ -f "$device/start/facts.json" ]; then start=(--from "$device/start"); fi
    local minutes=(--vae "${VAE:-1.2}" --small "${SMALL:-1.5}" --large "${LARGE:-3}" --deadline "${DEADLINE:-450}")
    # shellcheck disable=SC2086
    timeout -k 5 "$((${DEADLINE:-450} + 40))" "$python" $here/train.py "$device/pack" "$run" "${minutes[@]}" "${start[@]}" \
        --save "${SAVE:-1}" ${OPTIONS:-} 2>&1 | tee "$out/log.txt" ||
        "$python" $here/train.py "$device/pack" "$run" --collect ${WIDTHS:-} 2>&1 | tee -a "$out/log.txt"
    tail -n +1 "$run"/*.csv >> "$out/log.txt"
    mkdir -p "$out/weights" && cp "$run"/weights/* "$out/weights/"
    du -ab "$out"
}

take() {
    mkdir -p "$device/run/weights"
    cp "$1"/weights/* "$device/run/weights/"
    "$python" $here/train.py "$device/pack" "$device/run" --export "$device/tinysd" ${WIDTHS:-}
}

rehearse() {
    export DEVICE=build/rehearsal OUT=build/rehearsal/out SITE=build/rehearsal/site PACK="--photographs 120 --scenes 4 --shard 0.3"
    export WIDTHS="--vae-widths 8,8,16,16 --unet-widths 16,32,32,32" VAE=0.2 SMALL=0.2 LARGE=0.2 DEADLINE=150 SAVE=0.1
    export OPTIONS="--cpu --slow-ok --vae-batch 2 --vae-crop 64 --batch 4 --views 1 --large-views 1 $WIDTHS"
    device=$DEVICE
    rm -rf "$device"
    prepare "$1"
    train
    [ "$(find "$OUT" -type f | wc -l)" -le 8 ] || { echo "more than 8 files would come back"; exit 1; }
    [ -z "$(find "$OUT" -type f -size +16M)" ] || { echo "a file of more than 16 MiB would not come back"; exit 1; }
    rm -r "$device/run/vae" "$device/run/small" "$device/run/large"  # here it has only what came back
    take "$OUT"
    cp -r "$OUT/weights" "$device/start"
    echo "a second lease, on what came back:"
    VAE=0 SMALL=0 LARGE=0.1 train
    echo "rehearsed"
}

case "${1:-}" in
prepare | rehearse | take) "$1" "${2:?a folder}" ;;
train) train ;;
*) sed -n 's/^# \{0,1\}//p' "$0" | head -26; exit 2 ;;
esac

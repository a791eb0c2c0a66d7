#!/usr/bin/env bash
# The whole path in miniature, on two CPU cores in minutes: real handwritten digits -> latents -> a two-resolution DiMR ->
# samples -> npz -> a score. The same programs as for ImageNet; only the config differs. Run again, it does nothing twice.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
setup_environment requirements.txt

go_on() {
    if [ "${VIRTUAL_ENV:-}" = "$PWD/.venv" ]; then
        echo "Before the other commands, once in every shell: source .venv/bin/activate"
    fi
}

OUT=workdir/quickstart
if [ -f $OUT/report.json ]; then
    echo "Already done: $OUT/report.json, $OUT/samples.png, $OUT/loss.png (remove $OUT to run again)"
    go_on
    exit 0
fi
mkdir -p $OUT
[ -f $OUT/.seconds ] || echo 0 > $OUT/.seconds

step() {  # print and run a command, counting its seconds also over interrupted runs
    echo "+ $*"
    local start=$SECONDS
    "$@"
    echo $(($(cat $OUT/.seconds) + SECONDS - start)) > $OUT/.seconds
}

step python scripts/make_digits.py --out $OUT/digits
step python scripts/extract_imagenet_feature.py --images $OUT/digits/train --out $OUT/latents \
    --autoencoder assets/digits_autoencoder --resolution 32 --no-flip --dtype float32
step python train.py --config=configs/digits.py --workdir=$OUT/train
LAST=$(ls -d $OUT/train/ckpts/*.ckpt | sort -V | tail -n 1)
step python eval.py --config=configs/digits.py --nnet_path="$LAST" --IMGsave_path=$OUT/images
step python img2npz.py $OUT/images --out $OUT/images.npz
step python scripts/score_digits.py --images $OUT/images --digits $OUT/digits --train_dir $OUT/train \
    --out $OUT/report.json --seconds "$(cat $OUT/.seconds)"
echo "samples: $OUT/samples.png   loss curve: $OUT/loss.png   report: $OUT/report.json"
go_on

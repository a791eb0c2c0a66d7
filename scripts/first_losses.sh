#!/usr/bin/env bash
# Print the first losses of the digits run, to every digit: a refactor leaves them as they are. Any number of steps and
# settings: STEPS=5 bash scripts/first_losses.sh --config.train.batch_size=16
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-workdir/quickstart}
RUN=$(mktemp -d)
trap 'rm -rf "$RUN"' EXIT
export OMP_NUM_THREADS=1  # the number of threads changes last digits
{
    python scripts/make_digits.py --out "$DATA/digits"
    python scripts/extract_imagenet_feature.py --images "$DATA/digits/train" --out "$DATA/latents" \
        --autoencoder assets/digits_autoencoder --resolution 32 --no-flip --dtype float32
    python train.py --config=configs/digits_released.py --workdir="$RUN" --config.dataset.path="$DATA/latents" \
        --config.train.n_steps="${STEPS:-20}" --config.train.log_interval=1 "$@"
} > "$RUN/log" 2>&1 || { cat "$RUN/log" >&2; exit 1; }
python -c 'import json, sys; [print(r["step"], repr(r["loss"])) for r in map(json.loads, open(sys.argv[1]))]' "$RUN/metrics.jsonl"

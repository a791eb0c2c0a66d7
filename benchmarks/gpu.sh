#!/usr/bin/env bash
# What only a GPU shows: speed tables, where the time goes, checks, real runs. On one H100:
#     bash benchmarks/gpu.sh first     training and sampling speed, alone on the machine: some seven minutes
#     bash benchmarks/gpu.sh second    parts, tests, golden files and real runs, side by side: some six minutes
#     bash benchmarks/gpu.sh third     DiT, larger batches, the network compiled whole (minutes)
# or the names of stages: train_speed sample_speed parts golden tests run_xl run_fp16 peer larger whole
# golden_compiled. Results go to OUT (workdir/gpu unless set) as they come, at most eight files: a run that is cut off
# leaves what it had. LIMIT: seconds in all (570); a stage for which none are left is left out. TINY=1 DEVICE=cpu shows on
# a CPU that it runs.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-workdir/gpu}
LIMIT=${LIMIT:-570}
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
CONFIG=configs/DiMR-XL-2R_imagenet256.py
BATCH=64              # images of a training step
STEPS=60              # of the run in bf16
SHALLOW="9 5"         # depths of the network of the fp16 run: less to compile
FP16=fp16 BF16=bf16   # precisions
SAMPLES=50
NFE=10
if [ -n "${TINY:-}" ]; then
    CONFIG=benchmarks/tiny.py BATCH=4 STEPS=4 SHALLOW="3 3" FP16=no BF16=no SAMPLES=2 NFE=3
fi
WORK=${WORK:-$(df --output=avail,target /dev/shm 2>/dev/null | awk 'NR == 2 && $1 > 30000000 {print $2}')}
WORK=$(mktemp -d "${WORK:-/tmp}/dimr-gpu-XXXX")
trap 'rm -rf "$WORK"' EXIT
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD TF_CPP_MIN_LOG_LEVEL=3
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/dimr-inductor}
SECONDS=0

stage() {  # stage NAME SECONDS COMMAND...: into $OUT/NAME.txt, killed after so many seconds or when LIMIT is reached
    local name=$1 most=$2 left=$((LIMIT - SECONDS))
    shift 2
    if ((left < 15)); then
        echo "[$SECONDS s] $name: left out, no time" | tee -a "$OUT/stages.txt"
        return
    fi
    local begun=$SECONDS status=0
    echo "--- $*" >> "$OUT/$name.txt"
    timeout -k 5 $((most < left ? most : left)) "$@" >> "$OUT/$name.txt" 2>&1 || status=$?
    echo "[$SECONDS s] $name: $((SECONDS - begun)) s, status $status: ${*:1:12}" | tee -a "$OUT/stages.txt"
}

in_parallel() {  # functions, each in a process of its own
    local name
    for name in "$@"; do "$name" & done
    wait
}

# --- Speed: alone on the machine --------------------------------------------------------------------------------------

speed() {  # speed TASK SECONDS ARGUMENTS...
    local task=$1 most=$2
    shift 2
    stage results "$most" $PYTHON benchmarks/speed.py "$task" --config="$CONFIG" --device="$DEVICE" \
        --profile="$OUT/profile.txt" --rounds=2 "$@"
}

train_speed() {
    speed train 330 --batch="$BATCH" --losses=1 --variants="blocks-$BF16,released-$BF16"
}

sample_speed() {
    speed sample 240 --batch="$SAMPLES" --steps="$NFE" --losses=1 --variants="blocks-$BF16,released-$BF16"
}

peer() {  # DiT-XL/2, compiled
    speed train 120 --batch="$BATCH" --losses=0 --variants="dit_compiled-$BF16"
}

larger() {  # batches
    speed train 120 --batch=$((BATCH * 3 / 2)) --losses=0 --variants="blocks-$BF16"
    speed train 120 --batch=$((BATCH * 2)) --losses=0 --variants="blocks-$BF16-selective"
}

whole() {  # the network in one graph: compiling takes more than four minutes
    speed train 560 --batch="$BATCH" --losses=0 --variants="compiled-$BF16"
}

# --- Checks and runs: their time is the compiler's, so that they go side by side --------------------------------------

parts() {
    command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm --format=csv >> "$OUT/results.txt"
    stage results 90 $PYTHON benchmarks/parts.py --batch="$BATCH" --device="$DEVICE"
}

golden() {
    stage golden 110 $PYTHON scripts/check_golden.py tests/golden/*.safetensors --device "$DEVICE"
    stage golden 110 $PYTHON scripts/check_golden.py tests/golden/tiny_*.safetensors --device "$DEVICE" --precision bf16
}

golden_compiled() {
    stage golden 300 $PYTHON scripts/check_golden.py tests/golden/tiny_*.safetensors --device "$DEVICE" --compile whole
}

tests() {
    stage tests 400 $PYTHON -m pytest -n 8 --dist load -v --durations=0 -p no:cacheprovider tests/test_gpu.py
}

data() {
    [ -d "$WORK/data" ] || stage run_fp16 60 $PYTHON benchmarks/random_latents.py "$WORK/data" ${TINY:+--tiny} --records $((BATCH * 16))
}

settings() {  # settings of a run in folder $1 of $2 images a step
    echo --config="$CONFIG" --workdir="$WORK/$1" --config.dataset.path="$WORK/data/latents" --config.fid_stat= \
        --config.autoencoder.pretrained_path="$WORK/data/autoencoder" --config.train.batch_size="$2" \
        --config.train.keep_interval=0 --config.train.log_interval=5
}

run_xl() {  # as a user trains on one GPU
    ACCELERATE_MIXED_PRECISION=$BF16 stage run_bf16 300 $PYTHON train.py $(settings xl "$BATCH") --config.train.n_steps="$STEPS" \
        --config.train.eval_interval=100000 --config.train.save_interval=100000
    cat "$WORK/xl/metrics.jsonl" >> "$OUT/run_bf16.txt"
}

run_fp16() {  # fp16, a grid of samples, a checkpoint, resumed, a set of images
    local depths=(${SHALLOW}) flags
    flags="$(settings fp16 $((BATCH / 4))) --config.nnet.stages[0].depth=${depths[0]} --config.nnet.stages[1].depth=${depths[1]}"
    flags="$flags --config.train.eval_interval=10 --config.train.save_interval=10 --config.train.grid=(2,2)"
    flags="$flags --config.sample.grid_steps=4 --config.sample.sample_steps=6 --config.sample.n_samples=16 --config.sample.mini_batch_size=8"
    export ACCELERATE_MIXED_PRECISION=$FP16
    stage run_fp16 180 $PYTHON train.py $flags --config.train.n_steps=10
    # Resumed, and a warning at each place where the host waits for the device: the log, checkpoints and grids should be all.
    stage run_fp16 120 $PYTHON -W default -c "import runpy, sys, torch; torch.cuda.is_available() and torch.cuda.set_sync_debug_mode('warn'); sys.argv[0] = 'train.py'; runpy.run_path('train.py', run_name='__main__')" $flags --config.train.n_steps=20
    stage run_fp16 90 $PYTHON eval.py ${flags/--workdir=*fp16 /} --nnet_path="$WORK/fp16/ckpts/20.ckpt" --IMGsave_path="$WORK/images"
    unset ACCELERATE_MIXED_PRECISION
    { cat "$WORK/fp16/metrics.jsonl"; ls -la "$WORK/fp16/ckpts" "$WORK/fp16/samples"; ls "$WORK/images" | wc -l; } >> "$OUT/run_fp16.txt" 2>&1
    cp "$WORK/fp16/samples/20.png" "$OUT/grid.png" 2> /dev/null
}

# --- What to run ------------------------------------------------------------------------------------------------------

first() {
    train_speed
    sample_speed
}

second() {
    parts
    data
    in_parallel run_xl run_fp16 tests golden
}

third() {
    peer
    larger
    golden_compiled
    whole
}

for name in "${@:-first}"; do "$name"; done
grep -A 9 " busy$" "$OUT/profile.txt" 2> /dev/null  # of each variant: what its time goes to, without the kernels
cat "$OUT/results.txt" 2> /dev/null
tail -n 25 "$OUT/tests.txt" 2> /dev/null
sort -t[ -k2 -n "$OUT/stages.txt"

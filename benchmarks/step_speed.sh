#!/bin/sh
# Every set-up of a step that docs publish, one after the other, into results/step_speed.jsonl.
# Started again it goes on where it was, as long as the committed plugin is the same.
#
#   benchmarks/step_speed.sh              both models; some hours on two quiet cores
#   benchmarks/step_speed.sh 7b|smollm2   one of them
set -u
cd "$(dirname "$0")/.."
[ -n "${OMP_NUM_THREADS:-}" ] || export OMP_NUM_THREADS=1
results="${RESULTS:-benchmarks/results/step_speed.jsonl}"
failed=0

measure() {
    echo "== $*"
    timeout "${TIMEOUT:-3600}" "${PYTHON:-python}" benchmarks/step_speed.py \
        --json "$results" --resume --turns "${TURNS:-3}" "$@" || failed=$((failed + 1))
}

of_7b() {
    measure --rows ultrafeedback --checkpointing "$@"
}

of_smollm2() {
    measure --model outputs/smollm2-135m-instruct "$@"
}

if [ "${1:-7b}" = 7b ]; then
    of_7b --micro 1 --accumulation 8
    of_7b --micro 2 --accumulation 4
    of_7b --micro 4 --accumulation 2
    of_7b --micro 1 --accumulation 8 --no-sharing
    of_7b --micro 2 --accumulation 4 --no-sharing
    of_7b --micro 4 --accumulation 2 --no-sharing
    of_7b --micro 1 --accumulation 8 --no-sharing --precompute
    of_7b --micro 4 --accumulation 2 --no-sharing --precompute
    of_7b --micro 1 --accumulation 8 --ranks 2
    of_7b --micro 1 --accumulation 8 --chunked
    of_7b --micro 2 --accumulation 4 --chunked
    of_7b --micro 4 --accumulation 2 --chunked
fi
if [ "${1:-smollm2}" = smollm2 ]; then
    of_smollm2 --micro 1 --accumulation 8
    of_smollm2 --micro 2 --accumulation 8
    of_smollm2 --micro 8 --accumulation 1
    of_smollm2 --micro 1 --accumulation 8 --rows long
    of_smollm2 --micro 2 --accumulation 8 --chunked
    of_smollm2 --micro 1 --accumulation 8 --chunked
    of_smollm2 --micro 8 --accumulation 1 --chunked
    of_smollm2 --micro 1 --accumulation 8 --precompute
    of_smollm2 --micro 2 --accumulation 8 --precompute
    of_smollm2 --micro 1 --accumulation 8 --rows long --precompute
    of_smollm2 --micro 4 --accumulation 4 --mode unpaired
fi
[ "$failed" = 0 ] || echo "$failed set-ups failed or took too long" >&2
[ "$failed" = 0 ]

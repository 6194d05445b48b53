#!/usr/bin/env bash
# Train with torchrun on all GPUs of this machine, or on those of CUDA_VISIBLE_DEVICES. The same command resumes the run.
#
#     examples/one_machine.sh --data=data/mine.zip --cfg=auto
#
# GPUS=4 uses four GPUs. `python train.py --gpus=4` does the same, and no other machine can reach its processes.
set -euo pipefail
cd "$(dirname "$0")/.."

# exec: a signal to this script reaches torchrun, which forwards it and waits for the training state to be written.
exec torchrun --standalone --nproc-per-node="${GPUS:-gpu}" --shutdown-timeout=120 \
    train.py --outdir=runs --resume=latest "$@"

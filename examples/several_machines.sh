#!/usr/bin/env bash
# Train on several machines: run the same command on each. Checkout, --data and --outdir are on a shared file system.
#
#     FIRST=node1 MACHINES=2 examples/several_machines.sh --data=data/mine.zip --cfg=auto
#
# FIRST is the name or address of one of the machines, where the processes meet at PORT. Use trusted networks only
# (docs/running.md). The same commands resume the run.
set -euo pipefail
cd "$(dirname "$0")/.."

exec torchrun --nnodes="$MACHINES" --nproc-per-node="${GPUS:-gpu}" --shutdown-timeout=120 \
    --rdzv-backend=c10d --rdzv-endpoint="$FIRST:${PORT:-29500}" \
    train.py --outdir=runs --resume=latest "$@"

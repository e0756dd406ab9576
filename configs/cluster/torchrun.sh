#!/bin/bash
# On each of two machines, of which node0 is one:
#   NODES=2 DEVICES=8 MASTER=node0:29500 configs/cluster/torchrun.sh runs/big --config configs/sft/image.yaml --config configs/strategy/fsdp.yaml
# They meet at MASTER. Started again, it goes on from the newest whole checkpoint of the run folder, the first argument.
set -euo pipefail
run=$1
shift
resume=()
if [ -e "$run/config.yaml" ]; then resume=(--ckpt_path last); fi
exec torchrun --nnodes "${NODES:-1}" --nproc-per-node "${DEVICES:-1}" --rdzv-backend c10d \
    --rdzv-endpoint "${MASTER:-localhost:29500}" --rdzv-id "$(basename "$run")" train.py fit "$@" \
    --trainer.default_root_dir "$run" --trainer.num_nodes "${NODES:-1}" --trainer.devices "${DEVICES:-1}" "${resume[@]}"

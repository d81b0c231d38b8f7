#!/usr/bin/env bash
# Train on every GPU of this machine: scripts/launch/workstation.sh photos.zip --trigger TOK [options of lorabooth train]
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
# As torch counts them: it knows CUDA_VISIBLE_DEVICES, and takes one part of a divided GPU (MIG) at most.
gpus="$(lorabooth doctor --json | grep -c '"compute_capability"' || true)"
if [ "$gpus" -eq 0 ]; then
    echo "workstation.sh: torch sees no GPU here; lorabooth doctor says why" >&2
    exit 2
fi
if [ "$gpus" -lt 2 ]; then
    exec lorabooth train "$@"
fi
exec lorabooth train "$@" --launch "accelerate launch --config_file '$here/configs/accelerate/ddp.yaml' --num_processes $gpus"

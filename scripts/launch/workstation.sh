#!/usr/bin/env bash
# Train on every GPU of this machine: scripts/launch/workstation.sh photos.zip --trigger TOK [options of lorabooth train]
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
gpus="$(nvidia-smi --list-gpus | wc -l)"
if [ "$gpus" -lt 2 ]; then
    exec lorabooth train "$@"
fi
exec lorabooth train "$@" --launch "accelerate launch --config_file '$here/configs/accelerate/ddp.yaml' --num_processes $gpus"

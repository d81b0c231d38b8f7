#!/usr/bin/env bash
# Train in a rented GPU container (an image with CUDA and Python 3.11-3.13): scripts/launch/container.sh photos.zip --trigger TOK --consent [options of lorabooth train]
# --consent says that everyone in the photos has agreed: there is no terminal to ask at.
# It goes on when the connection is lost, and models and runs are kept on the volume (VOLUME, else /workspace). Needs HF_TOKEN for FLUX.1-dev.
set -euo pipefail
volume="${VOLUME:-/workspace}"
: "${HF_TOKEN:?set HF_TOKEN to a hub token that may read FLUX.1-dev}"
export HF_HOME="$volume/models"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
photos="$(realpath "${1:?the photos come first}")"
make -C "$here" .venv/.installed
mkdir -p "$volume/runs"
cd "$volume"
PATH="$here/.venv/bin:$PATH" nohup "$here/scripts/launch/workstation.sh" "$photos" "${@:2}" >>"$volume/runs/train.log" 2>&1 &
echo "training as process $!; watch it with: tail -f $volume/runs/train.log"

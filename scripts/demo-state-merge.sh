#!/usr/bin/env bash
# Writes a model that starts from a tuned state. As it is, takes the last state of demo-state-tuning.sh, which it runs
# first if there is none.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

base_model=${base_model:-scripts/data/base-v7-bytes.pth}
state_checkpoint=${state_checkpoint:-}
output=${output:-out/state-merged.pth}

prepare_environment plot
if [[ -z $state_checkpoint ]]; then
    state_checkpoint=out/state/rwkv-2.pth
    [[ -f $state_checkpoint ]] || bash scripts/demo-state-tuning.sh
fi

python merge.py --base_model "$base_model" \
    --state_checkpoint "$state_checkpoint" \
    --output "$output"

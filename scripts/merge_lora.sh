#!/usr/bin/env bash
# Adds a LoRA adapter to its base model. As it is, takes the last adapter of run_lora.sh, which it runs first if there
# is none.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

base_model=${base_model:-scripts/data/base-v7-bytes.pth}
lora_checkpoint=${lora_checkpoint:-}
output=${output:-out/lora-merged.pth}
TYPE=${TYPE:-lora}
Lora_alpha=${Lora_alpha:-32}

prepare_environment plot
if [[ -z $lora_checkpoint ]]; then
    lora_checkpoint=out/lora/rwkv-4.pth
    [[ -f $lora_checkpoint ]] || bash scripts/run_lora.sh
fi

python merge.py --base_model "$base_model" \
    --lora_checkpoint "$lora_checkpoint" \
    --output "$output" \
    --type "$TYPE" \
    --lora_alpha "$Lora_alpha"

#!/usr/bin/env bash
# Adds a LoRA adapter to its base model. As it is, takes the last adapter of run_lora.sh, which it runs first if there
# is none.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/method.sh"

lora_checkpoint=${lora_checkpoint:-$(last_adapter lora run_lora.sh)}
TYPE=${TYPE:-lora}
Lora_alpha=${Lora_alpha:-32}

merge_method lora --lora_checkpoint "$lora_checkpoint" --type "$TYPE" --lora_alpha "$Lora_alpha"

#!/usr/bin/env bash
# AdaLoRA, by way of Hugging Face peft, which is installed: LoRA that shares its ranks out among the matrices while it
# trains. With method=... any other method of that package. method.sh says what the environment can set.
set -euo pipefail
extras=${extras:-plot,peft}
source "$(dirname "${BASH_SOURCE[0]}")/method.sh"

method=${method:-adalora}
peft_config=${peft_config:-'{"init_r":32,"target_r":16,"lora_alpha":32}'}

train_method "$method" --peft "$method" --peft_config "$peft_config"

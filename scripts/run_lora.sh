#!/usr/bin/env bash
# LoRA: trains low-rank additions to the large matrices. method.sh says what the environment can set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/method.sh"

lora_config=${lora_config:-'{"lora_load":"","lora_r":32,"lora_alpha":32,"lora_dropout":0.0}'}

train_method lora --peft lora --lora_config "$lora_config"

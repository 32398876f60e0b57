#!/usr/bin/env bash
# DoRA: LoRA that learns the length of each output's weights apart from their direction. method.sh says what the
# environment can set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/method.sh"

peft_config=${peft_config:-'{"r":32,"lora_alpha":32,"lora_dropout":0.0}'}

train_method dora --peft dora --peft_config "$peft_config"

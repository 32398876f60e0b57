#!/usr/bin/env bash
# LoRA and state tuning at once: the states have rates of their own in peft_config. method.sh says what the environment
# can set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/method.sh"

peft_config=${peft_config:-'{"r":32,"lora_alpha":32,"lora_dropout":0.0,"state":{"lr_init":1,"lr_final":0.01}}'}

train_method lora_state --peft lora+state --peft_config "$peft_config"

#!/usr/bin/env bash
# LoRA on packed rows: several documents share a row, none sees another, and nothing is padded. method.sh says what the
# environment can set.
set -euo pipefail
# a batch is one row of micro_bsz * ctx_len tokens, which holds more documents than padded rows would
micro_bsz=${micro_bsz:-4}
epoch_steps=${epoch_steps:-0}
source "$(dirname "${BASH_SOURCE[0]}")/method.sh"

lora_config=${lora_config:-'{"lora_load":"","lora_r":32,"lora_alpha":32,"lora_dropout":0.0}'}

train_method packed --peft lora --lora_config "$lora_config" --dataload pack

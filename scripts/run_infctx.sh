#!/usr/bin/env bash
# Infinite context: LoRA on rows of ctx_len tokens, worked through in chunks of chunk_ctx, with exact gradients.
# infctx_grad=truncated cuts them between chunks. method.sh says what else the environment can set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/method.sh"

lora_config=${lora_config:-'{"lora_load":"","lora_r":32,"lora_alpha":32,"lora_dropout":0.0}'}

train_method infctx --peft lora --lora_config "$lora_config" \
    --train_type infctx --chunk_ctx "${chunk_ctx:-64}" --infctx_grad "${infctx_grad:-exact}"

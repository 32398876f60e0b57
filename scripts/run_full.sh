#!/usr/bin/env bash
# Full training: every weight of the model. As it is, on the shipped byte-level model and conversations.
# With a World model: tokenizer=world vocab_size=65536 load_model=... data_file=... and its n_layer and n_embd.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

load_model=${load_model:-scripts/data/base-v7-bytes.pth}
proj_dir=${proj_dir:-out/full}
data_file=${data_file:-}
tokenizer=${tokenizer:-bytes}

vocab_size=${vocab_size:-256}
n_layer=${n_layer:-4}
n_embd=${n_embd:-128}

micro_bsz=${micro_bsz:-8}
epoch_save=${epoch_save:-1}
epoch_steps=${epoch_steps:-36}
epoch_count=${epoch_count:-5}
ctx_len=${ctx_len:-256}
# 2e-5 or less for a World model
lr_init=${lr_init:-1e-3}
lr_final=${lr_final:-1e-4}

accelerator=${accelerator:-auto}
precision=${precision:-fp32}
strategy=${strategy:-auto}

prepare_environment plot
if [[ -z $data_file ]]; then
    prepare_library_data "$ctx_len"
    data_file=out/data/library
fi

python train.py --load_model "$load_model" \
    --proj_dir "$proj_dir" --data_file "$data_file" \
    --vocab_size "$vocab_size" --tokenizer "$tokenizer" \
    --n_layer "$n_layer" --n_embd "$n_embd" \
    --data_type binidx --dataload pad --loss_mask pad \
    --ctx_len "$ctx_len" --micro_bsz "$micro_bsz" \
    --epoch_steps "$epoch_steps" --epoch_count "$epoch_count" --epoch_begin 0 --epoch_save "$epoch_save" \
    --lr_init "$lr_init" --lr_final "$lr_final" --warmup_steps 0 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8 \
    --accelerator "$accelerator" --devices 1 --precision "$precision" --strategy "$strategy" --grad_cp 1 \
    --my_testing "x070" \
    --peft none

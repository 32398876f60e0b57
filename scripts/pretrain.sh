#!/usr/bin/env bash
# Pre-training as RWKV-LM's demo scripts do it, small enough for a CPU: text that every Python carries, initial weights
# (stage 1), training in the order of a magic prime up to a number of tokens (stage 3). Run again, it goes on where it
# was. The environment sets sizes; with data of your own (binidx, World vocabulary):
#   data_file=data/minipile tokenizer=world n_layer=12 n_embd=768 ctx_len=512 micro_bsz=16 exit_tokens=1498226207 \
#       magic_prime=2926181 lr_init=6e-4 lr_final=6e-5 accelerator=gpu precision=bf16 bash scripts/pretrain.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

my_testing=${my_testing:-x070}
n_layer=${n_layer:-4}
n_embd=${n_embd:-128}
data_file=${data_file:-}
tokenizer=${tokenizer:-bytes}
ctx_len=${ctx_len:-128}
# 40320 must be a multiple of the rows of all devices together
micro_bsz=${micro_bsz:-8}
exit_tokens=${exit_tokens:-400000}
magic_prime=${magic_prime:-}
proj_dir=${proj_dir:-out/L$n_layer-D$n_embd-$my_testing}

prepare_environment "${extras:-plot}"
mkdir -p "$proj_dir"

if [[ -z $data_file ]]; then
    data_file=$proj_dir/data
    [[ -f $data_file.idx ]] || {
        (cd scripts && python -c "
import json, base_corpus
for record in base_corpus.documents():
    print(json.dumps(record))") > "$proj_dir/corpus.jsonl"
        python make_data.py "$proj_dir/corpus.jsonl" 1 "$ctx_len" --seed 1 --tokenizer "$tokenizer" --output "$data_file"
    }
fi
if [[ -z $magic_prime ]]; then
    magic_prime=$(python -c "
import sys
from rwkvpeft.data.binidx import BinidxSource
from rwkvpeft.data.prime import magic_prime
print(magic_prime(BinidxSource(sys.argv[1]).n_tokens, int(sys.argv[2])))" "$data_file" "$ctx_len")
fi

model=(--my_testing "$my_testing" --n_layer "$n_layer" --n_embd "$n_embd" --tokenizer "$tokenizer"
    --precision "${precision:-fp32}" --proj_dir "$proj_dir")
[[ -f $proj_dir/rwkv-init.pth ]] || python train.py "${model[@]}" --train_stage 1 --random_seed "${random_seed:-1}"
python train.py "${model[@]}" --train_stage 3 --random_seed "${random_seed:-1}" \
    --data_file "$data_file" --ctx_len "$ctx_len" --magic_prime "$magic_prime" --my_exit_tokens "$exit_tokens" \
    --micro_bsz "$micro_bsz" --epoch_save "${epoch_save:-10}" --save_steps "${save_steps:-100}" \
    --lr_init "${lr_init:-2e-3}" --lr_final "${lr_final:-2e-4}" --warmup_steps 10 \
    --beta1 0.9 --beta2 0.99 --adam_eps 1e-18 --weight_decay 0.001 \
    --accelerator "${accelerator:-auto}" --devices "${devices:-1}" --grad_cp "${grad_cp:-0}"

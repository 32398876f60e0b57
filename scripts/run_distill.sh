#!/usr/bin/env bash
# Distillation: a small new model learns from a larger one, whose words are stored once. As it is, the teacher is the
# shipped model with the last adapter of run_lora.sh, which it runs first if there is none. With a World model:
#   teacher=large.pth load_model=small.pth tokenizer=world vocab_size=65536 n_layer=... n_embd=... data_file=... bash ...
# method.sh says what else the environment can set. teacher may be a folder that was stored before, too.
set -euo pipefail

load_model=${load_model:-0}
n_layer=${n_layer:-2}
n_embd=${n_embd:-64}
epoch_count=${epoch_count:-10}
source "$(dirname "${BASH_SOURCE[0]}")/method.sh"

temperature=${temperature:-2}
top_k=${top_k:-32}
labels=${labels:-out/teacher}

prepare_environment "$extras"
if [[ -z ${teacher:-} ]]; then
    lora=out/lora/rwkv-4.pth
    [[ -f $lora ]] || (unset load_model n_layer n_embd epoch_count && bash scripts/run_lora.sh)
    teacher=scripts/data/base-v7-bytes.pth
    teacher_flags=(--adapter "$lora")
fi
if [[ -z $data_file ]]; then
    prepare_library_data "$ctx_len"
    data_file=out/data/library
fi
if [[ ! -d $teacher ]]; then
    python -m rwkvpeft.teacher --model "$teacher" ${teacher_flags[@]+"${teacher_flags[@]}"} --tokenizer "$tokenizer" \
        --data_file "$data_file" --ctx_len "$ctx_len" --top_k "$top_k" --temperature "$temperature" --output "$labels"
    teacher=$labels
fi
train_method distill --objective distill --teacher "$teacher" --distill_temperature "$temperature" \
    --distill_top_k "$top_k" --distill_alpha "${alpha:-0.5}" "$@"

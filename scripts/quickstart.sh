#!/usr/bin/env bash
# From nothing to a tuned model that answers, on a CPU, in a few minutes: prepares the shipped conversations of a
# library's help desk, trains a LoRA adapter on the shipped base model, merges it, and compares the two models on
# questions that were not trained. Ends with an error if the held-out loss did not fall. Everything can be run again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

load_model=${load_model:-scripts/data/base-v7-bytes.pth}
data=${data:-scripts/data/library.jsonl}
heldout=${heldout:-scripts/data/library_heldout.jsonl}
proj_dir=${proj_dir:-out/quickstart}
tokenizer=${tokenizer:-bytes}

ctx_len=${ctx_len:-160}
micro_bsz=${micro_bsz:-4}
epoch_count=${epoch_count:-9}
lr_init=${lr_init:-6e-3}
lr_final=${lr_final:-3e-4}
peft_config=${peft_config:-'{"r":32,"lora_alpha":32,"lora_dropout":0.0}'}
# which of the 40 held-out questions to ask, from 1; so small a model answers about half of them right
questions=${questions:-10 16 22}
# the matrices of so small a model hardly gain from a second thread, and lose much by waiting on a busy machine
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

step() { printf '\n== %s\n' "$*"; }

heldout_loss() {
    local line
    line=$(python -m rwkvpeft.evaluate --model "$1" --data_file "$heldout" --tokenizer "$tokenizer" --loss_mask qa) ||
        return
    printf '%s\n' "$line" >&2
    awk '$1 == "loss" { print $2 }' <<< "$line"
}

# turn QUESTION 0 is what the user asks, 1 the expected answer
turn() {
    sed -n "${1}p" "$heldout" | python -c "
import json, sys
print(json.load(sys.stdin)['messages'][$2]['content'])"
}

# one line: an untuned model may break off into more
answer() {
    python -m rwkvpeft.generate --model "$1" --tokenizer "$tokenizer" --temperature 0 --max_tokens 120 \
        --stop $'\n\n' --prompt "User: $question"$'\n\n'"Assistant:" |
        tr '\n' ' ' | sed 's|^ *||; s| *$||'
}

step "Set-up"
prepare_environment plot
mkdir -p "$proj_dir"

step "1. Data: $data"
python make_data.py "$data" 1 "$ctx_len" --seed 1 --tokenizer "$tokenizer" --output "$proj_dir/data"

step "2. Held-out loss of $load_model"
before=$(heldout_loss "$load_model")

step "3. LoRA training"
python train.py --load_model "$load_model" --proj_dir "$proj_dir" --resume none \
    --data_file "$proj_dir/data" --tokenizer "$tokenizer" --dataload pad --loss_mask qa \
    --ctx_len "$ctx_len" --micro_bsz "$micro_bsz" --epoch_steps 0 --epoch_count "$epoch_count" \
    --lr_init "$lr_init" --lr_final "$lr_final" \
    --accelerator cpu --precision fp32 --random_seed 1 \
    --peft lora --peft_config "$peft_config"

step "4. Merging"
merged=$proj_dir/merged.pth
python merge.py --base_model "$load_model" --checkpoint "$proj_dir/rwkv-$((epoch_count - 1)).pth" --output "$merged"

step "5. Held-out loss of $merged"
after=$(heldout_loss "$merged")

step "6. Questions that were not trained"
printf '\nheld-out loss  before %s   after %s\n\n' "$before" "$after"
for number in $questions; do
    # assigned first: a failure inside printf's arguments would go unseen
    question=$(turn "$number" 0)
    answer_before=$(answer "$load_model")
    answer_after=$(answer "$merged")
    expected=$(turn "$number" 1)
    printf 'question       %s\n' "$question"
    printf 'before         %s\n' "$answer_before"
    printf 'after          %s\n' "$answer_after"
    printf 'expected       %s\n\n' "$expected"
done
printf 'Talk to it:    python -m rwkvpeft.generate --model %q --chat --temperature 0\n' "$merged"

python -c 'import sys; sys.exit(not float(sys.argv[2]) < float(sys.argv[1]))' "$before" "$after" || {
    echo "error: the held-out loss did not fall" >&2
    exit 1
}

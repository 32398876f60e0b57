#!/usr/bin/env bash
# Rewards of the model's own answers, in one command on a CPU: makes problems in addition and a small model that has
# imitated a careless pupil, rewards right answers, and ends with an error if problems that were never trained are not
# answered better then. Each value below can be set from the environment; flags of train.py go behind the script, as
#   bash scripts/run_grpo.sh --advantage centred --answer_mean dr_grpo --kl_beta 0.01
# With a model and prompts of your own, on a GPU:
#   load_model=... data_file=... heldout=... reward=rewards.py:judge tokenizer=world accelerator=gpu precision=bf16 \
#   ctx_len=512 answer_tokens=512 micro_bsz=4 lr_init=1e-5 lr_final=1e-6 bash scripts/run_grpo.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

proj_dir=${proj_dir:-out/grpo}
problems=${problems:-out/arithmetic}
load_model=${load_model:-$problems/base.pth}
data_file=${data_file:-$problems/train.jsonl}
heldout=${heldout:-$problems/heldout.jsonl}
# several are separated by spaces; =WEIGHT behind one that does not count once
reward=${reward:-scripts/arithmetic/reward.py:right}
tokenizer=${tokenizer:-bytes}

ctx_len=${ctx_len:-12}
group_size=${group_size:-8}
answer_tokens=${answer_tokens:-4}
micro_bsz=${micro_bsz:-32}
epoch_steps=${epoch_steps:-20}
epoch_count=${epoch_count:-4}
lr_init=${lr_init:-3e-3}
lr_final=${lr_final:-1e-3}
peft=${peft:-lora}
peft_config=${peft_config:-'{"r":16,"lora_alpha":32,"lora_dropout":0.0}'}
train_parts=${train_parts:-none}
accelerator=${accelerator:-cpu}
precision=${precision:-fp32}
random_seed=${random_seed:-1}
# the matrices of so small a model hardly gain from a second thread, and lose much by waiting on a busy machine
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

prepare_environment "${extras:-plot}"

if [[ ! -f $data_file ]]; then
    python scripts/arithmetic/problems.py --output "$problems"
fi
if [[ ! -f $load_model ]]; then
    python scripts/arithmetic/base.py --problems "$problems" --output "$load_model"
fi

read -ra functions <<< "$reward"
# resume=auto goes on with a run that was cut short
python train.py --objective grpo --load_model "$load_model" --proj_dir "$proj_dir" --resume "${resume:-none}" \
    --data_file "$data_file" --val_data_file "$heldout" --tokenizer "$tokenizer" --reward "${functions[@]}" \
    --ctx_len "$ctx_len" --group_size "$group_size" --answer_tokens "$answer_tokens" \
    --micro_bsz "$micro_bsz" --epoch_steps "$epoch_steps" --epoch_count "$epoch_count" \
    --lr_init "$lr_init" --lr_final "$lr_final" --peft "$peft" --peft_config "$peft_config" \
    --train_parts "$train_parts" --accelerator "$accelerator" --precision "$precision" --random_seed "$random_seed" "$@"

rewards=$(sed -n 's/.*"metrics": {"reward": \([^,}]*\).*/\1/p' "$proj_dir/val_data.jsonl")
printf 'mean reward of held-out prompts: %.3f before, %.3f after\n' "${rewards%%$'\n'*}" "${rewards##*$'\n'}"
awk -v before="${rewards%%$'\n'*}" -v after="${rewards##*$'\n'}" 'BEGIN { exit !(after > before) }' || {
    echo "error: the reward did not rise" >&2
    exit 1
}

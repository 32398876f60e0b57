# Sourced by the scripts of preference objectives. Each value below can be set from the environment, and those of
# method.sh. As they are, the scripts train on the shipped byte-level model and on pairs made by rule
# (preference_pairs.py). With a World model and pairs of your own (docs/preference_data.md):
#   tokenizer=world vocab_size=65536 load_model=... data_file=pairs.jsonl n_layer=... n_embd=... lr_init=1e-5 bash ...

epoch_steps=${epoch_steps:-40}
epoch_count=${epoch_count:-4}
source "$(dirname "${BASH_SOURCE[0]}")/method.sh"

val_data_file=${val_data_file:-}
peft=${peft:-lora}
# peft=state lr_init=3 lr_final=0.3 epoch_count=8 tunes nothing but the states
if [[ $peft == lora ]]; then
    peft_config=${peft_config:-'{"r":32,"lora_alpha":32,"lora_dropout":0.0}'}
fi

# train_preference OBJECTIVE FLAG...   trains into out/OBJECTIVE, unless proj_dir says otherwise
train_preference() {
    local objective=$1 held_out=()
    shift
    prepare_environment "$extras"
    if [[ -z $data_file ]]; then
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
        # the same pairs each time: an interrupted script goes on with the data it began with
        python scripts/preference_pairs.py --output out/preferences
        data_file=out/preferences/pairs.jsonl
        val_data_file=${val_data_file:-out/preferences/pairs_heldout.jsonl}
    fi
    [[ -z $val_data_file ]] || held_out=(--val_data_file "$val_data_file")
    python train.py --load_model "$load_model" \
        --proj_dir "${proj_dir:-out/$objective}" --data_file "$data_file" "${held_out[@]}" \
        --objective "$objective" --peft "$peft" --peft_config "${peft_config:-"{}"}" \
        --vocab_size "$vocab_size" --tokenizer "$tokenizer" \
        --n_layer "$n_layer" --n_embd "$n_embd" \
        --ctx_len "$ctx_len" --micro_bsz "$micro_bsz" \
        --epoch_steps "$epoch_steps" --epoch_count "$epoch_count" --epoch_begin 0 --epoch_save "$epoch_save" \
        --lr_init "${lr_init:-2e-3}" --lr_final "${lr_final:-2e-4}" --warmup_steps 10 \
        --beta1 0.9 --beta2 0.99 --adam_eps 1e-8 \
        --accelerator "$accelerator" --devices 1 --precision "$precision" --strategy "$strategy" --grad_cp 1 \
        --my_testing "x070" \
        "$@"
}

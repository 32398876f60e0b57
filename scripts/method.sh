# Sourced by the scripts of the methods. Each value below can be set from the environment. As they are, the scripts
# train on the shipped byte-level model and conversations. With a World model:
#   tokenizer=world vocab_size=65536 load_model=... data_file=... n_layer=... n_embd=... lr_init=1e-4 bash scripts/...

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

load_model=${load_model:-scripts/data/base-v7-bytes.pth}
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

accelerator=${accelerator:-auto}
precision=${precision:-fp32}
strategy=${strategy:-auto}
# extras of pyproject.toml to install: bnb for quantised bases, peft for Hugging Face's methods
extras=${extras:-plot}

# train_method NAME FLAG...   trains into out/NAME, unless proj_dir says otherwise
train_method() {
    local name=$1
    shift
    prepare_environment "$extras"
    if [[ -z $data_file ]]; then
        prepare_library_data "$ctx_len"
        data_file=out/data/library
    fi
    python train.py --load_model "$load_model" \
        --proj_dir "${proj_dir:-out/$name}" --data_file "$data_file" \
        --vocab_size "$vocab_size" --tokenizer "$tokenizer" \
        --n_layer "$n_layer" --n_embd "$n_embd" \
        --data_type binidx --dataload pad --loss_mask pad \
        --ctx_len "$ctx_len" --micro_bsz "$micro_bsz" \
        --epoch_steps "$epoch_steps" --epoch_count "$epoch_count" --epoch_begin 0 --epoch_save "$epoch_save" \
        --lr_init "${lr_init:-3e-3}" --lr_final "${lr_final:-3e-4}" --warmup_steps 0 \
        --beta1 0.9 --beta2 0.99 --adam_eps 1e-8 \
        --accelerator "$accelerator" --devices 1 --precision "$precision" --strategy "$strategy" --grad_cp 1 \
        --my_testing "x070" \
        "$@"
}

# merge_method NAME FLAG...   writes out/NAME-merged.pth, unless output says otherwise; the flags name the adapter
merge_method() {
    local name=$1
    shift
    prepare_environment "$extras"
    python merge.py --base_model "${base_model:-scripts/data/base-v7-bytes.pth}" \
        --output "${output:-out/$name-merged.pth}" \
        "$@"
}

# last_adapter NAME SCRIPT   prints the adapter that SCRIPT wrote last into out/NAME, after running it if there is none
last_adapter() {
    local file=out/$1/rwkv-$((epoch_count - 1)).pth
    [[ -f $file ]] || bash "scripts/$2" >&2
    printf '%s\n' "$file"
}

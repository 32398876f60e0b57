#!/usr/bin/env bash
# QLoRA: LoRA on a base in nf4, its scales in 8 bits too. run_quant.sh says what the environment can set.
set -euo pipefail

peft_config=${peft_config:-'{"r":32,"lora_alpha":32,"lora_dropout":0.0}'} \
    proj_dir=${proj_dir:-out/qlora} quant_flags=${quant_flags:---quant_double} \
    exec bash "$(dirname "${BASH_SOURCE[0]}")/run_quant.sh" nf4 lora

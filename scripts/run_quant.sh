#!/usr/bin/env bash
# Any method on a quantised base:  bash scripts/run_quant.sh [FORMAT] [METHOD]   for example  nf4 pissa  (QPiSSA)
# FORMAT is int8, nf4, fp4 or fp8. All but fp8 need bitsandbytes, which is installed. The environment can set quant_flags
# ("--quant_double --quant_head"), peft_config, and what method.sh says.
set -euo pipefail
quant=${1:-nf4}
method=${2:-lora}
extras=${extras:-plot,bnb}
source "$(dirname "${BASH_SOURCE[0]}")/method.sh"

default='{"r":32}'
if [[ $method == state ]]; then
    default='{}' lr_init=${lr_init:-1} lr_final=${lr_final:-1e-2}
fi
peft_config=${peft_config:-$default}
# unquoted below: it holds several flags
quant_flags=${quant_flags:-}

train_method "$quant-$method" --peft "$method" --peft_config "$peft_config" --quant "$quant" $quant_flags

#!/usr/bin/env bash
# PiSSA: trains the principal components of the large matrices, the rest stays frozen. Writes init_pissa.pth, the
# components as they were. method.sh says what the environment can set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/method.sh"

pissa_config=${pissa_config:-'{"pissa_load":"","pissa_init":"","pissa_r":32,"svd_niter":4}'}
# it starts from the largest components: LoRA's rates are too high
lr_init=${lr_init:-1e-3}
lr_final=${lr_final:-1e-4}

train_method pissa --peft pissa --pissa_config "$pissa_config"

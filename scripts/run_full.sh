#!/usr/bin/env bash
# Full training: every weight of the model. method.sh says what the environment can set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/method.sh"

# 2e-5 or less for a World model
lr_init=${lr_init:-1e-3}
lr_final=${lr_final:-1e-4}

train_method full --peft none

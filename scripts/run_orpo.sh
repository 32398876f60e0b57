#!/usr/bin/env bash
# ORPO: learns to answer as the chosen answers do, and which answers are preferred, in one go and without a reference.
# preference.sh says what the environment can set; orpo_alpha is the weight of the preference.
set -euo pipefail
lr_init=${lr_init:-3e-3} lr_final=${lr_final:-3e-4} epoch_count=${epoch_count:-5}
source "$(dirname "${BASH_SOURCE[0]}")/preference.sh"

train_preference orpo --beta "${orpo_alpha:-1}" --sft_share "${sft_share:-1}"

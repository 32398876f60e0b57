#!/usr/bin/env bash
# ORPO: learns to answer as the chosen answers do, and which answers are preferred, in one go and without a reference.
# preference.sh says what the environment can set; orpo_alpha is the weight of the preference.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/preference.sh"

train_preference orpo --beta "${orpo_alpha:-0.1}" --sft_share "${sft_share:-1}"

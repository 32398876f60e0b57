#!/usr/bin/env bash
# DPO: learns from pairs of answers which one is preferred, beside the model before training. preference.sh says what the
# environment can set. Another objective that compares with it:  bash scripts/run_dpo.sh kto   (ipo, wpo)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/preference.sh"

objective=${1:-dpo}

train_preference "$objective" --beta "${beta:-0.1}" --sft_share "${dpo_alpha:-0}" --reference "${reference:-auto}"

#!/usr/bin/env bash
# State tuning: trains the memory a conversation starts from, and no weight. method.sh says what the environment can set.
set -euo pipefail
epoch_count=${epoch_count:-3}
source "$(dirname "${BASH_SOURCE[0]}")/method.sh"

lr_init=${lr_init:-1}
lr_final=${lr_final:-1e-2}
op=${op:-auto}

train_method state --train_type "state" --op "$op"

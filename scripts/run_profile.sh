#!/usr/bin/env bash
# A layer profile: each layer with its own method, rank and rates, as RWKV-LM-RLHF's CSV files say it. method.sh says
# what the environment can set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/method.sh"

layer_profile=${layer_profile:-scripts/profiles/mixed.csv}

train_method profile --layer_profile "$layer_profile"

#!/usr/bin/env bash
# Writes a model that starts from a tuned state. As it is, takes the last state of demo-state-tuning.sh, which it runs
# first if there is none.
set -euo pipefail
epoch_count=${epoch_count:-3}
source "$(dirname "${BASH_SOURCE[0]}")/method.sh"

state_checkpoint=${state_checkpoint:-$(last_adapter state demo-state-tuning.sh)}

merge_method state --state_checkpoint "$state_checkpoint"

#!/usr/bin/env bash
# Adds an adapter of run_disha.sh to its base model. As it is, takes the last one, and runs that script first if there is
# none.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/method.sh"

peft_checkpoint=${peft_checkpoint:-$(last_adapter disha run_disha.sh)}

merge_method disha --peft_checkpoint "$peft_checkpoint" --type disha

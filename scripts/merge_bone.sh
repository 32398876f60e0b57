#!/usr/bin/env bash
# Adds an adapter of run_bone.sh to its base model. As it is, takes the last one, and runs that script first if there is
# none.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/method.sh"

peft_checkpoint=${peft_checkpoint:-$(last_adapter bone run_bone.sh)}

merge_method bone --peft_checkpoint "$peft_checkpoint" --type bone

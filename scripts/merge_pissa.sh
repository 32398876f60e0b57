#!/usr/bin/env bash
# Adds a PiSSA adapter to its base model. As it is, takes the last adapter of run_pissa.sh, which it runs first if there
# is none.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/method.sh"

pissa_checkpoint=${pissa_checkpoint:-$(last_adapter pissa run_pissa.sh)}
pissa_init=${pissa_init:-$(dirname "$pissa_checkpoint")/init_pissa.pth}
TYPE=${TYPE:-pissa}

merge_method pissa --lora_init "$pissa_init" --lora_checkpoint "$pissa_checkpoint" --type "$TYPE"

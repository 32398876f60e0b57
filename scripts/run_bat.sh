#!/usr/bin/env bash
# Bat: the form of Bone that multiplies blocks of the weight with what is trained. r must divide the sizes of all large
# matrices. method.sh says what the environment can set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/method.sh"

peft_config=${peft_config:-'{"r":32}'}

train_method bat --peft bat --peft_config "$peft_config"

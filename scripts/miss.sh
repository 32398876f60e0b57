#!/usr/bin/env bash
# MiSS: trains one small matrix for each large one, which its input channels share in turn. method.sh says what the
# environment can set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/method.sh"

peft_config=${peft_config:-'{"r":32}'}

train_method miss --peft miss --peft_config "$peft_config"

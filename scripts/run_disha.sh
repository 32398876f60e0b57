#!/usr/bin/env bash
# DiSHA, the earlier name of MiSS (see miss.sh), with the flags of that time. "mode":"bat" is Bat (see run_bat.sh).
# method.sh says what the environment can set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/method.sh"

disha_config=${disha_config:-'{"mode":"bone","load":"","r":32}'}

train_method disha --peft disha --disha_config "$disha_config"

#!/usr/bin/env bash
# Bone, the first name of MiSS (see miss.sh), with the flags of that time. "bone_mode":"bat" is Bat (see run_bat.sh).
# method.sh says what the environment can set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/method.sh"

bone_config=${bone_config:-'{"bone_mode":"bone","bone_load":"","bone_r":32}'}

train_method bone --peft bone --bone_config "$bone_config"

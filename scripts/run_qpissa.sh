#!/usr/bin/env bash
# QPiSSA: PiSSA on a base in nf4. What is trained is taken out before the rest is quantised, so that less is lost than
# with QLoRA. run_quant.sh says what the environment can set.
set -euo pipefail

lr_init=${lr_init:-1e-3} lr_final=${lr_final:-1e-4} proj_dir=${proj_dir:-out/qpissa} \
    exec bash "$(dirname "${BASH_SOURCE[0]}")/run_quant.sh" nf4 pissa

#!/usr/bin/env bash
# Sets up .venv with what the tests need, then runs them: the fast ones first, then those marked slow. Not those marked
# faults, which kill and cut off real processes for minutes:  bash scripts/test.sh -m faults
# With arguments, passes them to pytest and runs that alone:  bash scripts/test.sh tests/data
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
prepare_environment test

# processes of one thread each: PyTorch's threads wait for each other by spinning where cores are shared
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if (( $# )); then
    exec python -m pytest "$@"
fi
fast=0 slow=0
python -m pytest -n 2 --dist worksteal -m "not slow and not faults" || fast=$?
python -m pytest -n 2 --dist worksteal -m "slow and not faults" || slow=$?
(( fast == 0 && slow == 0 ))

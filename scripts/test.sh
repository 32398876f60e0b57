#!/usr/bin/env bash
# Sets up .venv with what the tests need, then runs them: the fast ones first, then those marked slow.
# With arguments, passes them to pytest and runs that alone:  bash scripts/test.sh tests/data
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
prepare_environment test

if (( $# )); then
    exec python -m pytest "$@"
fi
fast=0 slow=0
python -m pytest -m "not slow" || fast=$?
python -m pytest -m slow || slow=$?
(( fast == 0 && slow == 0 ))

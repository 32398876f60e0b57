# Sourced by the scripts beside it: goes to the repository root, makes .venv where it is missing or out of date, and
# puts its programs first on PATH. Call:  prepare_environment EXTRA   (an extra of pyproject.toml: plot, test)
#
#   VENV         the virtual environment's folder; default .venv in the repository
#   PYTHON       the Python that makes it, 3.10 or newer; default python3
#   TORCH_INDEX  package index to take PyTorch from; default pip's own. On Linux without an NVIDIA GPU, PyTorch's own
#                index of CPU builds (its installation page names it) spares a download of more than two gigabytes

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

prepare_environment() {
    local extra=$1 venv=${VENV:-$root/.venv} python=${PYTHON:-python3} wanted
    local stamp=$venv/installed-$extra
    wanted=$(cksum pyproject.toml constraints.txt)
    if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "error: $python is older than Python 3.10; name a newer one, such as PYTHON=python3.12" >&2
            return 2
        }
        [[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
        echo "Installing into $venv (once)"
        if [[ -n ${TORCH_INDEX:-} ]]; then
            "$venv/bin/python" -m pip install --quiet -c constraints.txt --index-url "$TORCH_INDEX" torch
        fi
        "$venv/bin/python" -m pip install --quiet -c constraints.txt -e ".[$extra]"
        printf '%s\n' "$wanted" > "$stamp"
    fi
    PATH=$venv/bin:$PATH
}

# Makes out/data/library.bin and .idx from the shipped conversations, the data that the scripts train on by default.
prepare_library_data() {
    local ctx_len=$1
    # the shipped model is so small that a second thread hardly helps, and loses much by waiting on a busy machine
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    mkdir -p out/data
    # the same order each time: an interrupted script goes on with the data it began with
    python make_data.py scripts/data/library.jsonl 1 "$ctx_len" --seed 1 --tokenizer bytes --output out/data/library
}

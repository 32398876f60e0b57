"""Compare make_data.py with upstream's script on one file, in one run: tokens per second, peak memory, same bytes.

    python benchmarks/make_data.py --upstream RWKV-LM/RWKV-v5 --size_mb 200 --epochs 1

The file is made for the purpose, from the documentation inside Python's standard library with some Chinese, Japanese,
Korean and emoji, unless --file names one. Upstream's script runs unchanged, after ``random.seed``. Memory is the
proportional set size of the process and its children, read ten times a second; Linux only.
"""

from __future__ import annotations

import argparse
import ast
import filecmp
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SEED = 2024
EAST = (
    "今天天气很好，我们去公园散步吧。",
    "机器学习模型需要大量的数据。",
    "床前明月光，疑是地上霜。",
    "吾輩は猫である。名前はまだ無い。",
    "東京は日本の首都です。",
    "안녕하세요, 만나서 반갑습니다.",
    "Съешь же ещё этих мягких французских булок.",
    "🙂🚀 ok 👍🏽 👩‍👩‍👧‍👦",
)
UPSTREAM = """
import random, runpy, sys, types
for name in ("lib2to3", "lib2to3.pgen2"):
    sys.modules.setdefault(name, types.ModuleType(name))
sys.modules["lib2to3.pgen2"].token = None
import torch
random.seed({seed})
sys.argv = ["make_data.py", {file!r}, "{epochs}", "{ctx_len}"]
sys.path.insert(0, ".")
runpy.run_path("make_data.py", run_name="__main__")
"""


class Run(NamedTuple):
    """One program's wall time, processor time of all its processes, and largest memory in all and without mapped files.

    In seconds and bytes.
    """

    seconds: float
    processor_seconds: float
    peak: int
    peak_own: int


def main() -> None:
    """Run both programs and print the comparison."""
    options = parse()
    work = Path(tempfile.mkdtemp(prefix="bench-make-data-", dir=options.folder))
    try:
        source = options.file.resolve() if options.file else make_file(work / "made.jsonl", options.size_mb)
        print(f"{source}: {source.stat().st_size / 1e6:.1f} MB, {options.epochs} epochs, {os.cpu_count()} processors")
        ours = run_ours(work, source, options)
        tokens = (work / f"{source.stem}.bin").stat().st_size // 2
        print_run("ours", ours, tokens)
        if options.upstream:
            upstream = run_upstream(work / "upstream", source, options)
            print_run("upstream", upstream, tokens)
            print(f"ours is {upstream.seconds / ours.seconds:.1f} times as fast, "
                  f"in processor time {upstream.processor_seconds / ours.processor_seconds:.1f} times")
            for suffix in (".bin", ".idx"):
                name = f"{source.stem}{suffix}"
                same = filecmp.cmp(work / name, work / "upstream" / name, shallow=False)
                print(f"{name}: {'identical' if same else 'DIFFERENT'}")
    finally:
        shutil.rmtree(work)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", type=Path, help="folder with upstream's make_data.py, src/ and tokenizer/")
    parser.add_argument("--file", type=Path, help="an existing jsonl with the field text")
    parser.add_argument("--size_mb", type=float, default=200, help="size of the file to make")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--ctx_len", type=int, default=4096)
    parser.add_argument("--workers", type=int, help="processes of ours; default: its own choice")
    parser.add_argument("--folder", type=Path, help="where the files go for the time being; default: the system's")
    return parser.parse_args()


def make_file(path: Path, size_mb: float) -> Path:
    """Documents of one to forty paragraphs, most of them English prose and code, one in five with other scripts."""
    paragraphs = library_paragraphs()
    choose = random.Random(SEED)
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size_mb * 1e6:
            parts = choose.choices(paragraphs, k=1 + int(39 * choose.random() ** 3))
            if choose.random() < 0.2:
                parts += choose.choices(EAST, k=choose.randrange(1, 30))
            line = json.dumps({"text": "\n\n".join(parts)}, ensure_ascii=choose.random() < 0.1)
            file.write(line + "\n")
            written += len(line.encode())
    return path


def library_paragraphs() -> list[str]:
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(encoding="utf-8")
        found += source.split("\n\n")[::7]
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                found += (ast.get_docstring(node) or "").split("\n\n")
    return [paragraph for paragraph in found if len(paragraph) > 20]


def run_ours(work: Path, source: Path, options: argparse.Namespace) -> Run:
    command = [sys.executable, str(ROOT / "make_data.py"), str(source), str(options.epochs), str(options.ctx_len)]
    command += ["--seed", str(SEED)] + (["--workers", str(options.workers)] if options.workers else [])
    return measure(command, work)


def run_upstream(folder: Path, source: Path, options: argparse.Namespace) -> Run:
    for part in ("src", "tokenizer"):
        shutil.copytree(options.upstream / part, folder / part)
    shutil.copy(options.upstream / "make_data.py", folder)
    code = UPSTREAM.format(seed=SEED, file=str(source), epochs=options.epochs, ctx_len=options.ctx_len)
    return measure([sys.executable, "-c", code], folder)


def measure(command: list[str], folder: Path) -> Run:
    peaks = [0, 0]
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def watch() -> None:
        while process.poll() is None:
            sizes = [memory(pid) for pid in family(process.pid)]
            for kind in (0, 1):
                peaks[kind] = max(peaks[kind], sum(size[kind] for size in sizes))
            time.sleep(0.1)

    before = os.times()
    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    seconds = time.monotonic() - began
    watcher.join()
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    if code != 0:
        raise SystemExit(f"{command[:3]} ended with {code}")
    return Run(seconds, used, peaks[0], peaks[1])


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []
    return [pid, *(member for child in children for member in family(child))]


def memory(pid: int) -> tuple[int, int]:
    """Bytes of a process, each shared page divided among its users; in all, and without mapped files."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0, 0
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return sizes.get("Pss", 0), sizes.get("Pss_Anon", 0)


def print_run(name: str, run: Run, tokens: int) -> None:
    millions = tokens / run.seconds / 1e6
    print(f"{name:<9} {run.seconds:7.1f} s, {millions:.2f} million tokens/s; processors {run.processor_seconds:.1f} s; "
          f"peak memory {run.peak / 1e6:.0f} MB, without mapped files {run.peak_own / 1e6:.0f} MB", flush=True)


if __name__ == "__main__":
    main()

"""Read spoiled files of every kind that users hand in, and tell of any end but a result or a UserError.

    python tests/fuzz/run.py --inputs 100000 --table fuzz.md    all kinds, 15 minutes on one core
    python tests/fuzz/run.py --kind pth yaml --inputs 5000      some kinds
    python tests/fuzz/run.py --kind pth --seed 123              one input again, with its traceback
    python tests/fuzz/run.py --kind pth --seed 123 --keep DIR   its files, into DIR

Each kind is read in a process of its own whose memory is bounded, with five seconds for an input. A process that dies
or stops answering is a finding too, and the next one goes on behind that input. A finding is also whatever starts a
program, opens a connection or writes outside the input's folder.
"""

import argparse
import faulthandler
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import readers
import torch

from rwkvpeft.errors import UserError

SECONDS = 5
ROOM_BYTES = 1 << 30
_GIVE_UP_SECONDS = 30
_FORBIDDEN = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "os.putenv")
_WRITING = ("os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.mkdir")


class TooLong(BaseException):
    pass


class Forbidden(BaseException):
    pass


def _too_long(*_):
    raise TooLong(f"more than {SECONDS} s")


def watch(folder):
    """Raise where a reader starts a program, connects, or writes outside ``folder``."""
    inside = str(folder)

    def hook(event, arguments):
        if event in _FORBIDDEN:
            raise Forbidden(f"{event} {arguments}")
        path = arguments[0] if arguments else None
        writes = event in _WRITING or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if writes and isinstance(path, str | bytes) and not os.path.abspath(os.fsdecode(path)).startswith(inside):
            raise Forbidden(f"{event} {arguments}")

    sys.addaudithook(hook)


def outcome_of(kind, folder):
    """How reading ends: result, refusal, or what else was raised."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        kind.read(folder)
        return "result", ""
    except UserError as error:
        # it is printed
        error.render().encode("utf-8", errors="backslashreplace")
        return "refusal", ""
    except (Exception, TooLong, Forbidden, SystemExit) as error:  # noqa: BLE001
        return "finding", "".join(traceback.format_exception(error))[-3000:]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def work(kind, name, folder, first, last, out):
    """Read some inputs of one kind in this process and write a line of JSON before and after each."""
    signal.signal(signal.SIGALRM, _too_long)
    # once undisturbed: what is imported or built at first use is not the input's memory
    readers.put(kind.seeds[0], folder)
    kind.read(folder)
    os.chdir(folder)
    watch(folder)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM_BYTES, resource.RLIM_INFINITY))
    at_first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(first, last):
        readers.put(readers.spoil(kind, random.Random(f"{name}-{seed}")), folder)
        print(json.dumps({"begin": seed}), file=out, flush=True)
        started = time.perf_counter()
        end, trace = outcome_of(kind, folder)
        seconds = time.perf_counter() - started
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - at_first) / 1024
        line = {"seed": seed, "end": end, "trace": trace, "seconds": seconds, "grown": grown}
        print(json.dumps(line), file=out, flush=True)


class Tally:
    """What came of one kind."""

    def __init__(self, name):
        self.name = name
        self.ends = {"result": 0, "refusal": 0, "finding": 0}
        self.longest, self.grown, self.findings = 0.0, 0.0, []

    def add(self, line):
        self.ends[line["end"]] += 1
        self.longest = max(self.longest, line["seconds"])
        self.grown = max(self.grown, line["grown"])
        if line["end"] == "finding":
            self.findings.append((line["seed"], line["trace"]))

    def row(self):
        return (
            f"| {self.name} | {sum(self.ends.values())} | {self.ends['refusal']} | {self.ends['result']} "
            f"| {self.ends['finding']} | {self.longest:.2f} | {self.grown:.0f} |"
        )


def run_kind(kind, name, folder, first, last, tally):
    """Read inputs ``first`` to ``last`` in as many processes as it takes."""
    while first < last:
        begun = None
        with tempfile.TemporaryFile() as errors:
            for line in _lines_of_a_child(lambda out, first=first: work(kind, name, folder, first, last, out), errors):
                begun = line.get("begin", begun)
                if "seed" in line:
                    tally.add(line)
                    first = line["seed"] + 1
            errors.seek(0)
            said = errors.read()[-3000:].decode(errors="replace")
        if first < last:
            if begun is None:
                raise SystemExit(f"kind {name} cannot be read at all\n{said}")
            tally.add(
                {"seed": begun, "end": "finding", "seconds": 0, "grown": 0, "trace": f"the process ended\n{said}"}
            )
            first = begun + 1


def _lines_of_a_child(body, errors):
    """What a forked process writes, as it comes; one that is silent too long is killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        os.dup2(errors.fileno(), 2)
        faulthandler.enable()
        try:
            with os.fdopen(writing, "w") as out:
                body(out)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        os._exit(0)
    os.close(writing)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    with os.fdopen(reading) as lines:
        signal.setitimer(signal.ITIMER_REAL, _GIVE_UP_SECONDS)
        for line in lines:
            yield json.loads(line)
            signal.setitimer(signal.ITIMER_REAL, _GIVE_UP_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.waitpid(child, 0)


def again(kind, name, folder, seed, keep):
    """One input once more, in this process."""
    signal.signal(signal.SIGALRM, _too_long)
    files = readers.spoil(kind, random.Random(f"{name}-{seed}"))
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        readers.put(files, keep)
    readers.put(files, folder)
    print(*outcome_of(kind, folder), sep="\n")


def show(tally):
    """Each different finding of a kind once, with what repeats it."""
    known = set()
    for seed, trace in tally.findings:
        places = [line for line in trace.splitlines() if line.startswith("  File")] or [""]
        mark = re.sub(r"[0-9]+", "", places[-1]) + trace.strip().rpartition("\n")[2][:24]
        if mark not in known:
            print(f"--kind {tally.name} --seed {seed}\n{trace}", file=sys.stderr)
        known.add(mark)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000, help="of all kinds together")
    parser.add_argument("--kind", nargs="+", help="of these alone, as many as they would be of all")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--first", type=int, default=0, help="the first seed of each kind")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--table", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    # what is written whole waits for the disk, which memory does not have
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True, dir=memory) as made:
        kinds, folder = readers.kinds(Path(made)), Path(made) / "input"
        folder.mkdir()
        if asked.seed is not None:
            return again(kinds[asked.kind[0]], asked.kind[0], folder, asked.seed, asked.keep)
        return run(kinds, folder, asked)


def run(kinds, folder, asked):
    """All inputs, a line of a table for each kind; 1 if anything was found."""
    lines = [
        "| kind | inputs | refused | read | findings | longest, s | memory, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    weights = sum(kind.share for kind in kinds.values())
    found = 0
    for name in asked.kind or kinds:
        kind = kinds[name]
        tally = Tally(name)
        run_kind(kind, name, folder, asked.first, asked.first + max(asked.inputs * kind.share // weights, 1), tally)
        lines.append(tally.row())
        print(lines[-1], flush=True)
        show(tally)
        found = found or int(bool(tally.findings))
    if asked.table:
        asked.table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    sys.exit(main())

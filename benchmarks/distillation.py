"""What a teacher's labels cost: bytes on the disk, time to read them, time of the loss; and what few tokens tell.

    python benchmarks/distillation.py

Reading: rows of 1,024 tokens of a vocabulary of 65,536, random, from files that the system holds in memory. Loss:
256 rows of hidden states, width 512, a trained head, forward and backward pass. What few tokens tell: the shipped base
model about the shipped held-out conversations, beside itself at another temperature as a stand-in for a student.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measuring import fastest

from rwkvpeft.checkpoints.load import load_model
from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.dataset import open_source
from rwkvpeft.data.label_index import LabelIndex, write_index
from rwkvpeft.data.teacher_labels import TeacherLabels
from rwkvpeft.data.tensor_file import to_bf16, write_arrays
from rwkvpeft.ops.cross_entropy import linear_cross_entropy
from rwkvpeft.ops.distillation import linear_distillation
from rwkvpeft.ops.divergence import Mix, Told, compare, likeliest

VOCABULARY = 65536
CTX_LEN = 1024
ROWS, WIDTH = 256, 512
DATA = Path(__file__).resolve().parents[1] / "scripts" / "data"


def index_of(top_k, dtype="fp16", temperatures=(1.0, 2.0), documents=8):
    places = documents * CTX_LEN
    return LabelIndex("t.pth", "f", VOCABULARY, top_k, dtype, temperatures, 0, documents, places + documents, "d",
                      places, places)


def bytes_and_reading():
    print("| K | bytes a token, fp16 | ... fp32 | read 1,024 tokens, ms |\n| ---: | ---: | ---: | ---: |")
    for top_k in (8, 32, 64, 256):
        index = index_of(top_k)
        milliseconds = reading_time(index)
        print(f"| {top_k} | {index.bytes_per_place} | {index_of(top_k, 'fp32').bytes_per_place} | {milliseconds:.2f} |")


def reading_time(index):
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_index(folder, index, np.full(index.documents, CTX_LEN + 1, np.int32))
        tokens = draw.integers(0, VOCABULARY, index.places)
        arrays = {
            "tokens": tokens,
            "ids": draw.integers(0, VOCABULARY, (index.places, index.top_k)),
            "logprobs": -draw.random((index.places, index.top_k)) * 10 - 5,
            "normalisers": np.ones((2, index.places)),
            "tails": -np.ones((2, index.places)),
        }
        write_arrays(index.shard_path(folder, 0), index.layouts(index.places), arrays)
        labels = TeacherLabels(folder, top_k=0, temperature=2.0)
        times = []
        for number in [*range(index.documents)] * 3:
            inputs = tokens[number * CTX_LEN : (number + 1) * CTX_LEN]
            start = time.perf_counter()
            labels.of(number, inputs, CTX_LEN)
            times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[len(times) // 2]


def loss_time(device):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=draw).to(device).requires_grad_()
    head = (torch.randn(VOCABULARY, WIDTH, generator=draw) / WIDTH**0.5).to(device).requires_grad_()
    labels = torch.randint(VOCABULARY, (ROWS,), generator=draw).to(device)
    weights = torch.ones(ROWS, device=device)
    found = likeliest(3 * torch.randn(ROWS, VOCABULARY, generator=draw), 64, (2.0,))
    told = Told(*(part.to(device) for part in (found.ids, found.logprobs / 2 - found.normalisers.T, found.tails[0])))
    common = {"normaliser": weights.sum(), "chunk_rows": 128}

    def plain():
        linear_cross_entropy(hidden, head, labels, weights, logit_penalty=0.0, **common).backward()

    def distilled(mix):
        return lambda: linear_distillation(hidden, head, labels, weights, told, mix=mix, **common).total.backward()

    runs = {"cross entropy alone": plain}
    runs |= {f"{kind}, T = 2": distilled(Mix(kind)) for kind in ("tail", "renorm", "student", "reverse")}
    runs |= {"tail, T = 1, alpha = 1": distilled(Mix("tail", 1.0, 1.0))}
    print("\n| loss | ms |\n| --- | ---: |")
    for name, run in runs.items():
        # of this process alone: others may be busy on a CPU
        seconds = processor_time(run) if device == "cpu" else fastest({name: run}, torch.device(device))[name]
        print(f"| {name} | {1e3 * seconds:.0f} |")


def processor_time(run):
    times = []
    for _ in range(4):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def few_tokens():
    model = load_model(DATA / "base-v7-bytes.pth", dtype=torch.float32)
    path = str(DATA / "library_heldout.jsonl")
    source = open_source(DataConfig(data_file=path, data_type="jsonl", tokenizer="bytes"))
    logits = []
    for document in range(len(source)):
        tokens = torch.from_numpy(source.read(document)[:-1].astype(np.int64))[None]
        with torch.no_grad():
            logits.append(model(tokens)[0][0])
    teacher = torch.cat(logits)
    student, labels = teacher * 0.7, torch.zeros(len(teacher), dtype=torch.int64)
    print(f"\n{len(teacher)} places, temperature 2\n\n| K | left for the rest | `tail` | of the whole | "
          "its error in fp16 | ... bf16 |\n| ---: | ---: | ---: | ---: | ---: | ---: |")
    whole = divergence(student, labels, words(teacher, 256))
    for top_k in (1, 4, 16, 32, 64, 256):
        told = words(teacher, top_k)
        exact = divergence(student, labels, told)
        rounded = [divergence(student, labels, words(teacher, top_k, dtype)) for dtype in ("fp16", "bf16")]
        print(f"| {top_k} | {100 * told.tail.exp().mean():.1f} % | {exact.mean():.4f} | "
              f"{100 * exact.mean() / whole.mean():.1f} % | "
              + " | ".join(f"{(found - exact).abs().mean():.0e}" for found in rounded) + " |")


def words(logits, top_k, dtype="fp32"):
    found = likeliest(logits, top_k, (2.0,))
    logprobs = found.logprobs.numpy()
    if dtype == "fp16":
        logprobs = logprobs.astype(np.float16).astype(np.float32)
    elif dtype == "bf16":
        logprobs = (to_bf16(logprobs).astype(np.uint32) << 16).view(np.float32)
    return Told(found.ids, torch.from_numpy(logprobs) / 2 - found.normalisers[0][:, None], found.tails[0])


def divergence(student, labels, told):
    return compare(student, labels, told, Mix("tail", 1.0, 2.0), gradient=False).divergence


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    bytes_and_reading()
    loss_time(arguments.device)
    few_tokens()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

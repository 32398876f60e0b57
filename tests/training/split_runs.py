"""Runs of one tiny model whose rows are dealt out in different ways, in processes of their own.

As a script: ``python split_runs.py FOLDER`` does the runs in FOLDER/jobs.json one after another; two such processes
share each run if the environment says so, as torchrun's does.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SEED = 5

# 24 rows a mini-epoch in steps of 8; and 20, so that its last step has 4
EVEN = {
    "1x8": {"micro_bsz": 1, "accumulate_grad_batches": 8, "epoch_steps": 24},
    "8x1": {"micro_bsz": 8, "accumulate_grad_batches": 1, "epoch_steps": 3},
    "two processes x 4": {"micro_bsz": 4, "accumulate_grad_batches": 1, "epoch_steps": 3, "devices": 2},
}
UNEVEN = {
    "1x8": {"micro_bsz": 1, "accumulate_grad_batches": 8, "epoch_steps": 20},
    "4x2": {"micro_bsz": 4, "accumulate_grad_batches": 2, "epoch_steps": 5},
    "two processes x 2x2": {"micro_bsz": 2, "accumulate_grad_batches": 2, "epoch_steps": 5, "devices": 2},
}
RUNS = {
    "full": (EVEN, {"peft": "none", "weight_decay": 0.1}),
    "lora": (UNEVEN, {"peft": "lora", "peft_config": {"r": 2, "lora_dropout": 0.0}, "train_parts": ["time", "ln"]}),
    "state": (UNEVEN, {"peft": "state", "lr_init": 1.0, "lr_final": 0.1}),
    "infctx": (EVEN, {"peft": "lora", "peft_config": {"r": 2, "lora_dropout": 0.0}, "infctx": True, "chunk_ctx": 4}),
}
COMMON = {"epoch_count": 2, "epoch_save": 1, "dropout": 0.0, "random_seed": SEED}


def job(method, layout, folder, stop=0):
    """A run to do.

    ``folder`` is where, with {rank} in it a place of each process's own; ``stop``: it is told to end in the middle of
    that optimizer step.
    """
    layouts, values = RUNS[method]
    values = {**COMMON, **values, **layouts[layout]}
    if values.get("devices", 1) > 1:
        values["strategy"] = "ddp"
    return {"folder": folder, "stop": stop, "values": values}


def do_runs(folder, jobs):
    """Do those runs, each in as many processes as it has devices; all of them have the same number."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    devices = jobs[0]["values"].get("devices", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(devices):
        shared = {"WORLD_SIZE": str(devices), "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "runs", "GROUP_RANK": "0",
                  "LOCAL_WORLD_SIZE": str(devices)}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(shared if devices > 1 else {})}
        command = [sys.executable, __file__, str(folder)]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-3000:]


def main(folder):
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    for described in json.loads((folder / "jobs.json").read_text()):
        name = described["folder"].format(rank=os.environ.get("RANK"))
        do_run(folder, folder / name, described["values"], described["stop"])


def do_run(folder, run, values, stop):
    import torch

    from rwkvpeft.adapters.build import build_adapter
    from rwkvpeft.checkpoints.adapter import Recipe
    from rwkvpeft.checkpoints.files import fingerprint
    from rwkvpeft.checkpoints.load import load_model
    from rwkvpeft.data.datamodule import TrainingData
    from rwkvpeft.training.fit import fit
    from tests.training.conftest import Rows, settings

    base = folder / "base.pth"
    config = settings(load_model=str(base), proj_dir=str(run), **values)
    adapter = build_adapter(config.method.peft, config.method.peft_config, config.method.train_parts)
    model = load_model(base, dtype=torch.float32)
    if adapter is not None:
        torch.manual_seed(SEED)
        adapter.attach(model)
    data = TrainingData(Rows(), schedule=config.schedule, data=config.data, seed=SEED)
    recipe = Recipe(method=config.method.peft, config=adapter.settings() if adapter else {},
                    base_fingerprint=fingerprint(base))
    with WatchedSteps(run, stop):
        fit(model=model, adapter=adapter, data=data, config=config, recipe=recipe, report=print)


class WatchedSteps:
    """Inside the block the rows that a run trains on are written down, and the run is told to end in a step."""

    def __init__(self, folder, stop):
        self.folder, self.stop = folder, stop

    def __enter__(self):
        from rwkvpeft.training.module import RwkvModule

        self.step = RwkvModule.training_step
        folder, stop, training_step = self.folder, self.stop, self.step

        def watched(module, batch, batch_idx):
            folder.mkdir(exist_ok=True)
            with (folder / f"rows-{module.global_rank}.jsonl").open("a") as file:
                for row in batch.input_ids.tolist():
                    file.write(json.dumps([module.progress.step, row]) + "\n")
            # the first of the step's batches: with more of them to come, the run must still end behind the last
            if module.progress.step + 1 == stop and module.global_rank == 0:
                signal.raise_signal(signal.SIGTERM)
            return training_step(module, batch, batch_idx)

        RwkvModule.training_step = watched

    def __exit__(self, *reason):
        from rwkvpeft.training.module import RwkvModule

        RwkvModule.training_step = self.step


if __name__ == "__main__":
    main(Path(sys.argv[1]))

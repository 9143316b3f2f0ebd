"""A whole training run, and what it costs beside one of plain LoRA.

Trainings of each seed on the sentences of small_task.py, 10 epochs, 1 thread, torch's
fused AdamW for plain LoRA. They go on epoch by epoch in one process, in a new order
every time; seconds are those of the training loop, divided by LoRA's.

- "LoRA", and "A/A", a second one;
- "LoRA, upper half": the lower three layers' A and B frozen from the start;
- "GateLoRA": at the true ELBO;
- "GateLoRA, freed at 1/3" and "at 1/2": the first epoch runs in half batches, so that
  no step of it keeps more than half of LoRA's bytes; then `free_lower_layers` removes
  the ranks of the lowest layers that hold at most this share;
- "GateLoRA, 3 layers freed": the same with three layers, chosen to bring the time below
  0.8; their ranks leave their means behind as a bias.

"bytes" is the most that autograd kept for a backward pass over the run, parameters left
out; "nll" and "ece" are of 8 samples where there is a posterior, accuracy is of its
mean. All are of the official dev set after the last epoch; nothing was chosen on it.
"forward" is the time of a forward pass of the trained network beside that of the
trained LoRA, "exported" that of the adapter that `export_peft` wrote, "predict" that of
16 samples, in deterministic forwards of the same network.

    PYTHONPATH=examples python examples/benchmarks/whole_run.py \\
        --data data/sst2

appends a line per seed and row to results/whole_run.jsonl and prints the table of all
lines.
"""

import argparse
import random
import shlex
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
import transformers
from benchmarks.measuring import append, bytes_kept
from benchmarks.predict_time import seconds_of
from peft import AutoPeftModelForSequenceClassification, PeftModel
from pyro.infer import SVI
from rank_selection import time_ratio
from small_task import BATCH, LR, TRAIN, Task, logits
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro.diagnostics.calibration import scores
from lrvd_pyro.gauge import BalanceSchedule, center, hankel_values
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA

RESULTS = Path(__file__).parent / "results" / "whole_run.jsonl"
SAMPLES, ROUNDS = 8, 21
COLUMNS = ["time", "bytes", "accuracy", "nll", "ece", "ranks"]
COLUMNS += ["forward", "exported", "predict"]
# what is freed, and whether means are left
FREED: dict[str, tuple[dict[str, Any], bool]] = {
    "GateLoRA, freed at 1/3": ({"share": 1 / 3}, False),
    "GateLoRA, freed at 1/2": ({"share": 1 / 2}, False),
    "GateLoRA, 3 layers freed": ({"layers": 3}, True),
}
Batch = dict[str, Tensor]


class Run:
    """One training: the seconds of its steps, and the bytes of its largest batches."""

    def __init__(self, task: Task, name: str) -> None:
        self.task, self.name, self.net = task, name, task.net()
        self.seconds, self.bytes, self.done = 0.0, 0, 0.0
        self.order = torch.Generator().manual_seed(task.seed)

    def epoch(self) -> None:
        """Go once through the training data."""
        self.net.train()
        batches = list(self.task.train.batches(self.size(), self.order))
        self.look(max(batches, key=lambda batch: batch["input_ids"].numel()))
        began = time.perf_counter()
        for batch in batches:
            self.step(batch)
            self.done += len(batch["labels"]) / TRAIN / self.task.num_epochs
        self.after_epoch()
        self.seconds += time.perf_counter() - began
        self.net.eval()

    def size(self) -> int:
        return BATCH

    def decay(self, step: int = 0) -> float:
        """The learning rate's factor: linear in the examples seen."""
        return max(0.0, 1 - self.done)

    def look(self, batch: Batch) -> None:
        """Note the bytes that this batch makes autograd keep."""
        with torch.random.fork_rng():
            kept = bytes_kept(lambda: self.loss(batch), self.net)
        self.bytes = max(self.bytes, kept)

    def loss(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def step(self, batch: Batch) -> None:
        raise NotImplementedError

    def after_epoch(self) -> None: ...

    def results(self) -> dict[str, float]:
        """Scores on the official dev set, and the ranks that are left."""
        raise NotImplementedError


class Plain(Run):
    """LoRA, on all layers or on the upper half."""

    def __init__(self, task: Task, name: str) -> None:
        super().__init__(task, name)
        if name == "LoRA, upper half":
            for module, parameter in self.net.named_parameters():
                if any(f".layer.{n}." in module for n in range(3)):
                    parameter.requires_grad_(False)
        trained = [p for p in self.net.parameters() if p.requires_grad]
        self.optim = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)

    def loss(self, batch: Batch) -> Tensor:
        loss: Tensor = self.net(**batch).loss
        return loss

    def step(self, batch: Batch) -> None:
        self.optim.param_groups[0]["lr"] = LR * self.decay()
        self.loss(batch).backward()
        self.optim.step()
        self.optim.zero_grad()

    def results(self) -> dict[str, float]:
        probs = logits(self.net, self.task.test).softmax(-1)
        rows = [p for n, p in self.net.named_parameters() if "lora_A" in n]
        ranks = sum(len(p) for p in rows if p.requires_grad)
        return scores(probs, self.task.test.labels) | {"ranks": ranks}


class Bayesian(Run):
    """GateLoRA, as it is or with lower layers freed after an epoch."""

    def __init__(self, task: Task, name: str) -> None:
        super().__init__(task, name)
        self.model = GateLoRA(self.net, num_data=TRAIN)
        self.guide = RankDiagonal(self.model)
        self.optim = lrvd.optim.AdamW(lr=LR, variational_lr=0.05, schedule=self.decay)
        self.svi = SVI(self.model, self.guide, self.optim, loss=lrvd.RankELBO())
        self.gather: BalanceSchedule | None = None
        if name in FREED:
            self.gather = BalanceSchedule(
                self.model, self.guide, self.optim, every=10**9
            )

    def size(self) -> int:
        return BATCH // 2 if self.gather else BATCH

    def loss(self, batch: Batch) -> Tensor:
        loss: Tensor = lrvd.RankELBO()(self.model, self.guide)(**batch)
        return loss

    def step(self, batch: Batch) -> None:
        self.svi.step(**batch)
        if self.gather:
            self.gather.step()

    def after_epoch(self) -> None:
        if self.gather:
            found, (which, means_left) = self.gather.gramians(), FREED[self.name]
            self.gather.close()
            if means_left:
                center(self.model, found)
                found = found.centered()
            sizes = hankel_values(found)
            lrvd.free_lower_layers(
                self.model, self.guide, self.optim, hankel_values=sizes, **which
            )
            self.gather = None

    def results(self) -> dict[str, float]:
        test = self.task.test
        with lrvd.posterior_mean(self.model, self.guide) as net:
            mean = scores(logits(net, test).softmax(-1), test.labels)
        found = lrvd.predict(self.model, self.guide, test.in_order(), SAMPLES)
        drawn = scores(found.probs, test.labels)
        line = drawn | {"accuracy": mean["accuracy"], "sampled": drawn["accuracy"]}
        return line | {"ranks": self.model.space.size}

    def times(self, plain: PeftModel) -> dict[str, float]:
        """Forward passes of the trained network, as it is and exported."""
        batch = next(iter(self.task.test.in_order()))
        model, guide = self.model, self.guide
        predict = least(lambda: lrvd.predict(model, guide, [batch], 16), ROUNDS // 3)
        with lrvd.posterior_mean(model, guide) as net, torch.no_grad():
            forward = least(lambda: net(**batch), ROUNDS)
            live = time_ratio(net, plain, batch, ROUNDS)
        with tempfile.TemporaryDirectory() as folder:
            lrvd.export_peft(folder, model, guide, probe=batch)
            load = AutoPeftModelForSequenceClassification.from_pretrained
            small = load(folder, num_labels=2).eval()
            exported = time_ratio(small, plain, batch, ROUNDS)
        times = {"forward": live, "exported": exported, "predict": predict / forward}
        model.release()
        guide.release()
        return times


ROWS: dict[str, type[Run]] = {
    "LoRA": Plain,
    "A/A": Plain,
    "LoRA, upper half": Plain,
    "GateLoRA": Bayesian,
} | dict.fromkeys(FREED, Bayesian)


def least(call: Callable[[], Any], rounds: int) -> float:
    """The least seconds of a few calls."""
    return min(seconds_of(call) for _ in range(rounds))


def measure(task: Task, rows: Iterable[str]) -> list[dict[str, Any]]:
    """One line per row of a seed, and LoRA's."""
    order = random.Random(task.seed)
    names = dict.fromkeys(["LoRA", *rows])
    runs = [ROWS[name](task, name) for name in names]
    for _ in range(task.num_epochs):
        for run in order.sample(runs, len(runs)):
            run.epoch()
    plain, lines = runs[0], []
    for run in runs:
        ratios = {
            "time": run.seconds / plain.seconds,
            "bytes": run.bytes / plain.bytes,
            "lora_seconds": plain.seconds,
        }
        line = {"row": run.name, "seed": task.seed} | ratios | run.results()
        if isinstance(run, Bayesian):
            line |= run.times(plain.net)
        lines.append(line)
    return lines


def table(frame: pd.DataFrame) -> str:
    """Mean and standard deviation over seeds."""
    groups = frame.groupby("row", sort=False)[COLUMNS]
    parts = [groups.mean(), groups.std()]
    return "\n\n".join(part.round(3).to_string() for part in parts)


def main(argv: list[str] | None = None) -> None:
    """Train each seed, then show all lines so far."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, help="10")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="a JSON lines file")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    words = ["whole_run.py", "--data", options.data.name]
    for seed in options.seeds:
        lines = measure(Task(options.data, seed, options.epochs), options.rows)
        command = [*words, "--seeds", str(seed), "--rows", *options.rows]
        append(lines, options.out, shlex.join(command))
    frame = pd.read_json(options.out, lines=True)
    print(table(frame.drop_duplicates(["row", "seed"], keep="last")))


if __name__ == "__main__":
    main()

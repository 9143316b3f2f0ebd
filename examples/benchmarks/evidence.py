"""Noise by evidence beside early stopping, temperature scaling and Laplace.

`small_task` has the data and the schedule: MiniLM-L6, LoRA of rank 8 on query and
value. 500 texts that are not trained on choose epochs and temperatures; the official
dev or test set (2,000 texts of it at most) is scored, and chooses nothing. Rows of one
seed share texts, initial weights and the order of batches.

    PYTHONPATH=examples python examples/benchmarks/evidence.py \\
        --data data/sst2 --trained runs/evidence

appends a line per seed and row to results/evidence.jsonl and prints the table of that
data set. Trained networks are kept in the folder and used again.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import transformers
from peft import PeftModel
from small_task import TRAIN, R, Task, logits
from torch import Tensor
from trained_nets import Pair, factor_lora, gate_lora, lora

import lrvd_pyro as lrvd
from lrvd_pyro.diagnostics import calibration_report, fit_temperature
from lrvd_pyro.gauge import noise_by_evidence
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.likelihoods import Categorical, CategoricalPrediction
from lrvd_pyro.models import GateLoRA

SAMPLES = 8
RESULTS = Path(__file__).parent / "results" / "evidence.jsonl"
COLUMNS = ["accuracy", "nll", "brier", "ece", "failure_auroc", "seconds"]
Noise = Literal["scaled", "fisher", "tied"]
ON_LORA: tuple[Noise, ...] = ("tied", "fisher")
ON_GATES: tuple[Noise, ...] = ("scaled", "tied")
Rows = Iterator[tuple[str, CategoricalPrediction, float]]


def plain(task: Task, net: PeftModel, name: str) -> Rows:
    """A network at a point, as it is and with a temperature."""
    began = time.perf_counter()
    on_test = logits(net, task.test)
    yield name, collected(on_test), time.perf_counter() - began
    temperature = fit_temperature(logits(net, task.dev), task.dev.labels)
    scaled = collected(on_test / temperature)
    yield f"{name} + temperature", scaled, time.perf_counter() - began


def collected(on_test: Tensor) -> CategoricalPrediction:
    """The prediction of a network without noise."""
    likelihood = Categorical()
    return likelihood.collect(likelihood.summarize(on_test[None]))


def gated(task: Task, folder: Path) -> Pair:
    """Plain LoRA with gates that have not been trained."""
    model = GateLoRA(lora(task, folder), num_data=len(task.train))
    return model, RankDiagonal(model)


def evident(task: Task, pair: Pair, name: str, noise: Noise) -> Rows:
    """A trained pair with its noise by evidence, linearized and by draws."""
    began = time.perf_counter()
    pair = noise_by_evidence(*pair, task.train.in_order(32), noise=noise)
    ways: dict[str, Literal["linearized", "sample"]]
    ways = {"linearized": "linearized", f"{SAMPLES} samples": "sample"}
    for way, method in ways.items():
        batches = task.test.in_order()
        prediction = lrvd.predict(*pair, batches, SAMPLES, method=method)
        yield f"{name}, {noise}, {way}", prediction, time.perf_counter() - began


def rows(task: Task, folder: Path, *, weights: bool) -> Rows:
    """All rows of one seed."""
    yield from plain(task, lora(task, folder), "LoRA, last epoch")
    yield from plain(task, lora(task, folder, stopped=True), "LoRA, early stopped")
    for noise in ON_LORA:
        yield from evident(task, gated(task, folder), "LoRA", noise)
    began = time.perf_counter()
    drawn = lrvd.predict(*gate_lora(task, folder), task.test.in_order(), SAMPLES)
    yield f"GateLoRA, {SAMPLES} samples", drawn, time.perf_counter() - began
    for noise in ON_GATES:
        yield from evident(task, gate_lora(task, folder), "GateLoRA", noise)
    if weights:
        yield from evident(task, factor_lora(task, folder), "FactorLoRA", "scaled")


def table(lines: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, one row per method."""
    groups = pd.DataFrame(lines).groupby("row", sort=False)[COLUMNS]
    mean, sd, count = groups.mean(), groups.std(), groups.size()
    text = ["| | seeds | " + " | ".join(COLUMNS) + " |", "|---" * 8 + "|"]
    for row in mean.index:
        pairs = zip(COLUMNS, mean.loc[row], sd.loc[row])
        cells = [f"{m:.{d}f} ± {s:.{d}f}" for m, s, d in map(_digits, pairs)]
        text.append(f"| {row} | {count[row]} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def _digits(cell: tuple[str, float, float]) -> tuple[float, float, int]:
    column, mean, sd = cell
    return mean, sd, 0 if column == "seconds" else 3


def main(argv: list[str] | None = None) -> None:
    """Run the rows of some seeds, and print the table of this data set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder of texts")
    parser.add_argument("--trained", type=Path, required=True, help="where nets lie")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--count", type=int, default=TRAIN, help="texts to train on")
    parser.add_argument("--r", type=int, default=R, help="the rank of the adapter")
    parser.add_argument("--weights", action="store_true", help="FactorLoRA too")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a JSON lines file")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    options.trained.mkdir(parents=True, exist_ok=True)
    setting = {"data": options.data.name, "count": options.count, "r": options.r}
    for seed in options.seeds:
        task = Task(options.data, seed, count=options.count, r=options.r)
        labels = task.test.labels
        for row, prediction, seconds in rows(
            task, options.trained, weights=options.weights
        ):
            report = calibration_report(prediction, labels, num_bootstrap=1)
            values = {c: getattr(report, c).value for c in COLUMNS if c != "seconds"}
            line = setting | {"row": row, "seed": seed, "seconds": seconds} | values
            line |= {"torch": torch.__version__, "lrvd_pyro": lrvd.__version__}
            with open(options.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    lines = [json.loads(line) for line in options.out.read_text().splitlines()]
    print(table([line for line in lines if setting.items() <= line.items()]))


if __name__ == "__main__":
    main()

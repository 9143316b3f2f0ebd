"""Noise by evidence beside early stopping, temperature scaling and Laplace.

`evidence_task.Task` has the data and the schedule: MiniLM-L6, LoRA of rank 8 on query
and value. 500 texts that are not trained on choose epochs and temperatures; the
official dev or test set (2,000 texts of it at most) is scored, and chooses nothing.
Rows of one seed share texts, initial weights and the order of batches.

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
from evidence_task import Task, Tensors, logits, restored, trained
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro.diagnostics import calibration_report, fit_temperature
from lrvd_pyro.gauge import noise_by_evidence
from lrvd_pyro.guides import RankDiagonal, TiedDiagonal
from lrvd_pyro.likelihoods import Categorical, CategoricalPrediction
from lrvd_pyro.models import FactorLoRA, GateLoRA

SAMPLES = 8
RESULTS = Path(__file__).parent / "results" / "evidence.jsonl"
COLUMNS = ["accuracy", "nll", "brier", "ece", "failure_auroc", "seconds"]
Pair = tuple[Any, Any]
Rows = Iterator[tuple[str, CategoricalPrediction, float]]


def plain(task: Task, method: str, name: str, folder: Path) -> Rows:
    """A network at a point, as it is and with a temperature."""
    net = restored(task, trained(task, method, folder))
    _, dev, test = task.parts
    began = time.perf_counter()
    on_test = logits(net, test)
    yield name, collected(on_test), time.perf_counter() - began
    temperature = fit_temperature(logits(net, dev), dev.labels)
    scaled = collected(on_test / temperature)
    yield f"{name} + temperature", scaled, time.perf_counter() - began


def collected(on_test: Tensor) -> CategoricalPrediction:
    """The prediction of a network without noise."""
    likelihood = Categorical()
    return likelihood.collect(likelihood.summarize(on_test[None]))


def pair_of(task: Task, state: Tensors, *, of_weights: bool = False) -> Pair:
    """A model and its guide with the tensors of a training."""
    net, count = restored(task, state), len(task.parts[0])
    if of_weights:
        model: Any = FactorLoRA(net, num_data=count, sides=("lora_A", "lora_B"))
        guide: Any = TiedDiagonal(model)
    else:
        model = GateLoRA(net, num_data=count)
        guide = RankDiagonal(model)
    if (noise := state.get("guide.log_variance")) is not None:
        guide.load_state_dict({"log_variance": noise})
    return model, guide


def predicted(
    task: Task, pair: Pair, method: Literal["sample", "linearized"]
) -> CategoricalPrediction:
    """The prediction for the test set."""
    batches = task.parts[2].in_order()
    prediction: CategoricalPrediction = lrvd.predict(
        *pair, batches, SAMPLES, method=method
    )
    return prediction


def evident(
    task: Task,
    method: str,
    name: str,
    noise: Literal["scaled", "fisher", "tied"],
    folder: Path,
) -> Rows:
    """A trained pair with its noise by evidence, linearized and by draws."""
    began = time.perf_counter()
    state = trained(task, method, folder)
    model, guide = pair_of(task, state, of_weights=method == "factor")
    pair = noise_by_evidence(model, guide, task.parts[0].in_order(32), noise=noise)
    for way in ("linearized", "sample"):
        prediction = predicted(task, pair, way)
        of = f"{SAMPLES} samples" if way == "sample" else way
        yield f"{name}, {noise}, {of}", prediction, time.perf_counter() - began


def rows(task: Task, folder: Path, *, weights: bool) -> Rows:
    """All rows of one seed."""
    yield from plain(task, "lora", "LoRA, last epoch", folder)
    yield from plain(task, "stopped", "LoRA, early stopped", folder)
    for noise in ("tied", "fisher"):
        yield from evident(task, "lora", "LoRA", noise, folder)
    began = time.perf_counter()
    pair = pair_of(task, trained(task, "gate", folder))
    sampled = predicted(task, pair, "sample")
    yield f"GateLoRA, {SAMPLES} samples", sampled, time.perf_counter() - began
    for noise in ("scaled", "tied"):
        yield from evident(task, "gate", "GateLoRA", noise, folder)  # type: ignore[arg-type]
    if weights:
        yield from evident(task, "factor", "FactorLoRA", "scaled", folder)


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
    parser.add_argument("--count", type=int, default=1500, help="texts to train on")
    parser.add_argument("--r", type=int, default=8, help="the rank of the adapter")
    parser.add_argument("--weights", action="store_true", help="FactorLoRA too")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a JSON lines file")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    options.trained.mkdir(parents=True, exist_ok=True)
    setting = {"data": options.data.name, "count": options.count, "r": options.r}
    for seed in options.seeds:
        task = Task(options.data, seed, options.count, options.r)
        labels = task.parts[2].labels
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

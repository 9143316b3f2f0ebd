"""How many ranks an adapter needs: a sweep over the pruning threshold.

GateLoRA at the true ELBO and FactorLoRA (noise on A and B, KL weight 0.1, rising over
the first half of training) on the sentences of small_task.py; FactorLoRA also with a
RankSchedule that removes ranks beyond log alpha 3 in the second half of training, ten
looks in all. Ranks with log alpha above the threshold are left out of the posterior
mean; the official dev set is scored at every threshold. Then the adapter is pruned at
log alpha 3 and exported: its size on disk and the time of a forward pass beside those
of the plain LoRA.

    python examples/rank_selection.py --data data/sst2 data/cola

appends a line per seed, model and threshold to results/rank_selection.jsonl, prints the
table of all lines and draws results/rank_selection.png.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import transformers
from matplotlib import pyplot as plt
from peft import AutoPeftModelForSequenceClassification, PeftModel
from pyro.infer import SVI
from small_task import LR, TRAIN, Task, logits

import lrvd_pyro as lrvd
from lrvd_pyro.diagnostics.calibration import scores
from lrvd_pyro.guides import RankDiagonal, RankGuide, TiedDiagonal
from lrvd_pyro.models import FactorLoRA, GateLoRA

THRESHOLDS = (-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 20.0)
THRESHOLD = 3.0  # for pruning
SIDES: Any = ("lora_A", "lora_B")
LOOKS = 20  # of a RankSchedule, were it at work from the first step


class Recipe(NamedTuple):
    """How to make and to train a model."""

    build: Any
    guide: Any
    kl_weight: float = 1.0
    variational_lr: float = 0.05
    warmup: float = 0.0  # share of training
    prunes: bool = False  # while training, after the warm-up


FACTOR = Recipe(partial(FactorLoRA, sides=SIDES), TiedDiagonal, 0.1, 0.2, 0.5)
MODELS = {
    "GateLoRA": Recipe(GateLoRA, RankDiagonal),
    "FactorLoRA": FACTOR,
    "FactorLoRA, pruned in training": FACTOR._replace(prunes=True),
}
RESULTS = Path(__file__).parent / "results" / "rank_selection.jsonl"


def trained(task: Task, name: str) -> tuple[Any, RankGuide]:
    """A model of that name and its guide, trained."""
    recipe = MODELS[name]
    net = task.net()
    model = recipe.build(net, num_data=TRAIN)
    guide = recipe.guide(model)
    warmup = int(recipe.warmup * task.steps)
    rise = lrvd.linear_warmup(warmup)
    elbo = lrvd.RankELBO(kl_weight=lambda step: recipe.kl_weight * rise(step))
    optim = lrvd.optim.AdamW(
        lr=LR, variational_lr=recipe.variational_lr, schedule=task.decay
    )
    svi = SVI(model, guide, optim, loss=elbo)
    schedule = lrvd.RankSchedule(
        model, guide, optim, start=warmup, every=-(-task.steps // LOOKS), elbo=elbo
    )
    for batches in task.epochs(net):
        for batch in batches:
            svi.step(**batch)
            if recipe.prunes and bool((guide.log_alpha < THRESHOLD).any()):
                schedule.step()
    return model, guide


def sweep(task: Task, model: Any, guide: RankGuide) -> Iterator[dict[str, float]]:
    """Scores of the posterior mean at each threshold."""
    log_alpha = guide.log_alpha
    for threshold in THRESHOLDS:
        keep = (log_alpha < threshold).float()
        with lrvd.posterior_mean(model, guide) as net, model.space.bind(keep):
            probs = logits(net, task.test).softmax(-1)
        found = scores(probs, task.test.labels)
        yield {"threshold": threshold, "rank": int(keep.sum())} | found


def exported(task: Task, model: Any, guide: RankGuide) -> dict[str, float]:
    """The pruned and exported adapter beside plain LoRA: bytes, and forward time."""
    if not bool((guide.log_alpha < THRESHOLD).any()):
        return {}  # nothing to export
    plain = task.net().eval()
    batch = next(iter(task.test.in_order()))
    with tempfile.TemporaryDirectory() as name:
        folders = Path(name) / "pruned", Path(name) / "plain"
        lrvd.prune(model, guide, log_alpha_threshold=THRESHOLD)
        lrvd.export_peft(folders[0], model, guide, probe=batch)
        plain.save_pretrained(str(folders[1]))
        sizes = [(f / "adapter_model.safetensors").stat().st_size for f in folders]
        load = AutoPeftModelForSequenceClassification.from_pretrained
        small = load(str(folders[0]), num_labels=2).eval()
    return {"bytes": sizes[0] / sizes[1], "time": time_ratio(small, plain, batch)}


@torch.no_grad()
def time_ratio(one: PeftModel, other: PeftModel, batch: Any, rounds: int = 31) -> float:
    """The median of paired forward times, one over the other."""
    ratios = []
    for _ in range(rounds):
        seconds = []
        for net in (one, other):
            began = time.perf_counter()
            net(**batch)
            seconds.append(time.perf_counter() - began)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def table(frame: pd.DataFrame) -> str:
    """Means and standard deviations over seeds."""
    keys = ["data", "model", "threshold"]
    groups = frame.groupby(keys)[["rank", "accuracy", "nll", "ece"]]
    both = pd.concat({"mean": groups.mean(), "sd": groups.std()}, axis=1)
    ratios = frame.dropna(subset="bytes").groupby(keys[:2])[["bytes", "time"]].mean()
    return f"{both.round(3).to_string()}\n\n{ratios.round(3).to_string()}"


def picture(frame: pd.DataFrame, path: Path) -> None:
    """Accuracy and NLL against the ranks kept, a column for each data set."""
    names = list(frame["data"].unique())
    figure, axes = plt.subplots(
        2, len(names), figsize=(5 * len(names), 7), layout="constrained", squeeze=False
    )
    for column, name in zip(axes.T, names):
        for model in MODELS:
            own = frame[(frame["data"] == name) & (frame["model"] == model)]
            rows = own.to_dict("records")
            lrvd.plots.threshold_sweep(
                rows, score="accuracy", label=model, ax=column[0]
            )
            lrvd.plots.threshold_sweep(rows, score="nll", label=model, ax=column[1])
        column[0].set_title(f"{name}: log alpha thresholds at the points")
        column[1].set_title("")
    figure.savefig(path, dpi=90)


def main(argv: list[str] | None = None) -> None:
    """Run what is asked for, then show all lines so far."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=RESULTS, help="a JSON lines file")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for seed, folder in itertools.product(options.seeds, options.data):
        task = Task(folder, seed)
        for name in options.models:
            model, guide = trained(task, name)
            lines = list(sweep(task, model, guide))
            lines[-1] |= exported(task, model, guide)
            given = {"data": folder.name, "model": name, "seed": seed}
            with open(options.out, "a", encoding="utf-8") as file:
                for line in lines:
                    file.write(json.dumps(given | line) + "\n")
            model.release()
            guide.release()
    frame = pd.read_json(options.out, lines=True)
    print(table(frame))
    picture(frame, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()

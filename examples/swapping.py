"""What swap_prior.py and swap_guide.py share: one fit, and a table over seeds."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import peft
import pyro
import torch
from pyro.infer import SVI
from quickstart import linear_decay, train
from quickstart_task import Task, load_task, options
from transformers.utils import logging

import lrvd_pyro as lrvd
from lrvd_pyro.diagnostics.calibration import scores
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.predictive.draws import draw_latents

RESULTS = Path(__file__).parent / "results"
Variant = Callable[[Task, argparse.Namespace], dict[str, float]]


def fit(name: str, model: GateLoRA, guide: Any, task: Task, args: Any) -> float:
    """Train a pair by SVI on the true ELBO; returns the seconds."""
    optim = lrvd.optim.AdamW(lr=args.lr, schedule=linear_decay(task, args))
    svi = SVI(model, guide, optim, loss=lrvd.RankELBO())
    count = len(task.train)
    return train(name, lambda b: float(svi.step(**b)) / count, task, args)


def score(model: GateLoRA, guide: Any, task: Task, args: Any) -> dict[str, float]:
    """Scores on test, and the effective rank of the gates' posterior."""
    probs = lrvd.predict(model, guide, task.test.in_order(), args.samples).probs
    found = scores(probs, task.test.labels)
    draws = [model.value_at(draw_latents(model, guide, {})) for _ in range(400)]
    gates = torch.stack(draws).detach()
    alpha = gates.var(0) / gates.mean(0).square()
    found["effective rank"] = float((1 / (1 + alpha)).sum())
    return {key: value for key, value in found.items() if key != "brier"}


def compare(title: str, variants: dict[str, Variant], argv: list[str] | None) -> None:
    """Run every variant on every seed; print and write the table."""
    parser = options(title)
    parser.add_argument("--seeds", type=int, default=3, help="how many; 3")
    parser.add_argument("--out", type=Path, help="a markdown file for the table")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = []
    for seed in range(args.seeds):
        args.seed = seed
        task = load_task(args)
        for name, run in variants.items():
            rows.append({"": name} | run(task, args))
    text = f"{title}, {args.seeds} seeds, mean ± standard deviation\n\n{table(rows)}\n"
    print(text)
    if args.out:
        versions = {m.__name__: m.__version__ for m in (lrvd, torch, pyro, peft)}
        args.out.write_text(f"{text}\n{versions}\n", encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation of each variant's rows, as markdown."""
    groups = pd.DataFrame(rows).groupby("", sort=False)
    mean, sd = groups.mean(), groups.std()
    text = [
        "| | " + " | ".join(mean.columns) + " |",
        "|---" * (mean.shape[1] + 1) + "|",
    ]
    for name in mean.index:
        cells = []
        for column in mean.columns:
            digits = 3 if abs(mean.loc[name, column]) < 10 else 1
            m, s = mean.loc[name, column], sd.loc[name, column]
            cells.append(f"{m:.{digits}f} ± {s:.{digits}f}")
        text.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(text)

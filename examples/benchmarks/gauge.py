"""The balanced gauge on a real network: ranks kept, energy, one-pass posteriors.

Plain LoRA on the sentences of small_task.py (MiniLM-L6, rank 8 on query and value), for
10 epochs as in lora_vs_lrvd.py (its NLL on dev is least after 3 or 4); then passes over
the training sentences, their labels sampled. Of the 96 rank components k are kept, in
the order of

- log alpha in the balanced gauge, and in the gauge that training left;
- the Fisher information over random subsets, in the balanced gauge;
- t, the balanced singular values;
- log alpha, and the Fisher information over random subsets, in the balanced gauge of
  covariances, gates acting about their means ("centered"): ranks left out leave their
  mean as a bias;
- the singular values of each module's update dW, in its basis; and the same ranks with
  the means of the others left as a bias ("means kept");
- the norms |b_i||a_i| of plain LoRA;
- chance.

Energy is what the first k components of one module keep of its update,
``1 - |dW - dW_k|^2 / |dW|^2``, in the Frobenius norm and in the whitened one; "auc" is
its mean over k = 1 .. 8 and modules. The one-pass posteriors predict with 16 samples.
What was chosen (multiplicity 2, the order over subsets) was chosen on "dev", 500 other
training sentences; "test" is the official dev set.

    PYTHONPATH=examples python examples/benchmarks/gauge.py \\
        --data data/sst2

appends lines to results/gauge.jsonl, prints the tables of all lines and draws those of
the first data set as results/gauge.png.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from matplotlib import pyplot as plt
from one_pass import POSTERIORS
from peft import PeftModel
from small_task import BATCH, EPOCHS, TRAIN, Task, logits, train_lora
from text_data import Encoded
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro.diagnostics.calibration import scores
from lrvd_pyro.gauge import Gramians, balance, center, gramians, hankel_values
from lrvd_pyro.models import GateLoRA

BUDGETS = (48, 24, 16, 12, 8, 4)
TABLES = ("order", "posterior")
RESULTS = Path(__file__).parent / "results" / "gauge.jsonl"
KEYS = ["data", "trained", "seed", "table", "order", "k", "module", "metric"]
KEYS += ["part", "posterior"]
Line = dict[str, Any]


def run(task: Task, tables: list[str], names: list[str]) -> Iterator[Line]:
    """The lines of these tables for one seed and data set."""
    net = task.net()
    began = time.perf_counter()
    train_lora(task, net)
    epoch = (time.perf_counter() - began) / task.num_epochs
    model = GateLoRA(net, num_data=TRAIN)
    batches = list(task.train.batches(BATCH, torch.Generator().manual_seed(task.seed)))
    if "order" in tables:
        full = scores(logits(net, task.test).softmax(-1), task.test.labels)
        yield {"table": "order", "order": "", "k": model.space.size} | full
        with restored(net):
            for name, worth, moments in orders(model, batches):
                line = {"order": name}
                yield from sweep(task, model, worth, line)
                if moments is not None:
                    yield from energies(model, worth, moments, line)
    if "posterior" in tables:
        yield from posteriors(task, net, batches, epoch, names)
    model.release()


def orders(model: GateLoRA, batches: list[Any]) -> Iterator[tuple[str, Tensor, Any]]:
    """In each order its name, the worth of each component, and the moments.

    The network is then in the gauge that belongs to the order. Alpha falls where the
    exact Fisher information of the gates rises. Where means are left as a bias, dW
    alone has lost more energy than the network, and there are no moments.
    """
    trained = gramians(model, batches, generator=labels_of(0))
    yield "trained gauge", trained.gate_fisher, trained
    norms = [a.norm(dim=1) * b.norm(dim=0) for a, b in pairs(model)]
    yield "norm", torch.cat(norms), trained
    chance = torch.rand(model.space.size, generator=labels_of(2))
    yield "random", chance, trained
    with restored(model.base_net):
        balance(model.base_net, trained)
        balanced = gramians(model, batches, generator=labels_of(1))
        yield "balanced", balanced.gate_fisher, balanced
        some = gramians(model, batches, gates="subsets", generator=labels_of(3))
        yield "balanced, over subsets", some.gate_fisher, balanced
        sizes = torch.cat(list(hankel_values(trained).values()))
        yield "balanced, by t", sizes, balanced
    with restored(model.base_net):
        center(model, trained)
        balance(model.base_net, trained.centered())
        centered = gramians(model, batches, generator=labels_of(1))
        yield "centered", centered.gate_fisher, None
        some = gramians(model, batches, gates="subsets", generator=labels_of(3))
        yield "centered, over subsets", some.gate_fisher, None
        center(model, None)
    sizes = to_singular_vectors(model)
    found = gramians(model, batches, generator=labels_of(1))
    yield "SVD of dW", sizes, found
    center(model, found)
    yield "SVD of dW, means kept", sizes, None
    center(model, None)


@torch.no_grad()
def to_singular_vectors(model: GateLoRA) -> Tensor:
    """Move A and B to the singular vectors of dW; returns its singular values."""
    found = []
    for a, b in pairs(model):
        left, sizes, right = torch.linalg.svd(b @ a, full_matrices=False)
        r = len(a)
        a.copy_(sizes[:r, None].sqrt() * right[:r])
        b.copy_(left[:, :r] * sizes[:r].sqrt())
        found.append(sizes[:r])
    return torch.cat(found)


def sweep(task: Task, model: GateLoRA, worth: Tensor, line: Line) -> Iterator[Line]:
    """Scores on test with the k components of greatest worth."""
    for k in BUDGETS:
        gate = torch.zeros(model.space.size)
        gate[worth.argsort(descending=True)[:k]] = 1
        with model.space.bind(gate):
            probs = logits(model.base_net, task.test).softmax(-1)
        found = scores(probs, task.test.labels)
        yield {"table": "order"} | line | {"k": k} | found


@torch.no_grad()
def energies(
    model: GateLoRA, worth: Tensor, moments: Gramians, line: Line
) -> Iterator[Line]:
    """What the first k components of each module keep of the energy of its update."""
    for name, (a, b) in zip(model.space.modules, pairs(model), strict=True):
        order = model.space.split(worth)[name].argsort(descending=True)
        grams = {
            "Frobenius": (a @ a.T) * (b.T @ b),
            "whitened": moments.activations[name] * moments.gradients[name],
        }
        for metric, gram in grams.items():
            sorted_ = gram[order][:, order]
            lost = [sorted_[k:, k:].sum() / gram.sum() for k in range(1, len(a) + 1)]
            kept = [1 - float(share) for share in lost]
            found = {"module": name, "metric": metric, "energy": kept}
            yield {"table": "energy", "auc": statistics.mean(kept)} | line | found


def posteriors(
    task: Task, net: PeftModel, batches: list[Any], epoch: float, names: list[str]
) -> Iterator[Line]:
    """Scores of each one-pass posterior on dev, and on test if it is one to report."""
    parts: list[tuple[str, Encoded]] = [("dev", task.dev), ("test", task.test)]
    for part, data in parts:
        found = scores(logits(net, data).softmax(-1), data.labels)
        yield {"table": "posterior", "part": part, "posterior": "plain LoRA"} | found
    for name in names:
        build, reported = POSTERIORS[name]
        with restored(net):
            began = time.perf_counter()
            predict, release = build(net, batches)
            line: Line = {"table": "posterior", "posterior": name}
            line |= {"passes": (time.perf_counter() - began) / epoch}
            for part, data in parts[: 1 + reported]:
                yield line | {"part": part} | scores(predict(data), data.labels)
            release()


def pairs(model: GateLoRA) -> list[tuple[Tensor, Tensor]]:
    """A and B of each module."""
    sides = model.space.weights("lora_A"), model.space.weights("lora_B")
    return list(zip(*sides, strict=True))


class restored:
    """Puts trainable parameters back to what they were, whatever the block did."""

    def __init__(self, net: PeftModel) -> None:
        self.before = [(p, p.detach().clone()) for p in net.parameters()]

    def __enter__(self) -> None: ...

    @torch.no_grad()
    def __exit__(self, *error: object) -> None:
        for parameter, value in self.before:
            parameter.copy_(value)


def labels_of(seed: int) -> torch.Generator:
    """What labels are sampled with."""
    return torch.Generator().manual_seed(seed)


def show(frame: pd.DataFrame) -> str:
    """The three tables, mean and standard deviation over seeds."""
    by = ["data", "trained", "order"]
    order = frame[frame["table"] == "order"].pivot_table(
        "accuracy", by, "k", aggfunc=["mean", "std"], sort=False
    )
    energy = frame[frame["table"] == "energy"].pivot_table(
        "auc", by, "metric", aggfunc=["mean", "std"], sort=False
    )
    rows = frame[frame["table"] == "posterior"].copy()
    keys = ["data", "trained", "seed", "part"]
    plain = rows[rows["posterior"] == "plain LoRA"].set_index(keys)
    of_rows = pd.MultiIndex.from_frame(rows[keys])
    columns = ["accuracy", "nll", "ece", "passes"]
    for score in ("nll", "ece"):
        rows[f"{score} ratio"] = rows[score] / plain[score].reindex(of_rows).to_numpy()
        columns.append(f"{score} ratio")
    by = ["data", "trained", "part", "posterior"]
    groups = rows.groupby(by, sort=False)[columns]
    parts = [order, energy, groups.mean(), groups.std()]
    return "\n\n".join(part.round(3).to_string() for part in parts)


def picture(frame: pd.DataFrame, path: Path) -> None:
    """Energy against the components of a module, accuracy against those of all."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    of_orders = frame["order"].dropna().replace("", pd.NA).dropna().unique()
    colors = {order: f"C{i}" for i, order in enumerate(sorted(of_orders))}
    style: Line = {"marker": "o", "ms": 3, "lw": 1}
    energy = frame[frame["table"] == "energy"]
    for ax, metric in zip(axes, ("Frobenius", "whitened")):
        for order, rows in energy[energy["metric"] == metric].groupby("order"):
            curve = torch.tensor(rows["energy"].tolist()).mean(0)
            ks = range(1, len(curve) + 1)
            ax.plot(ks, curve, color=colors[str(order)], **style)
        ax.set(xlabel="components of a module", title=f"energy kept, {metric} norm")
    orders = frame[frame["table"] == "order"]
    for order, rows in orders[orders["order"] != ""].groupby("order"):
        mean = rows.groupby("k")["accuracy"].mean()
        color = colors[str(order)]
        axes[2].plot(mean.index, mean, color=color, label=order, **style)
    full = orders[orders["order"] == ""]["accuracy"].mean()
    axes[2].axhline(full, color="gray", lw=0.8, ls="--", label="all 96")
    axes[2].set(xlabel="components kept, of 96", title="accuracy on test")
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=90)


def main(argv: list[str] | None = None) -> None:
    """Run what is asked for, then show all lines so far."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, nargs="+", default=[EPOCHS], help="10")
    parser.add_argument("--tables", nargs="+", default=TABLES, choices=TABLES)
    names = list(POSTERIORS)
    parser.add_argument("--posteriors", nargs="+", default=names, choices=names)
    parser.add_argument("--out", type=Path, default=RESULTS, help="a JSON lines file")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    given: Line = {"torch": torch.__version__, "lrvd_pyro": lrvd.__version__}
    runs = itertools.product(options.epochs, options.seeds, options.data)
    for epochs, seed, folder in runs:
        given |= {"data": folder.name, "trained": epochs, "seed": seed}
        task = Task(folder, seed, epochs)
        for line in run(task, options.tables, options.posteriors):
            with open(options.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(given | line) + "\n")
    frame = pd.read_json(options.out, lines=True)
    frame = frame.drop_duplicates([c for c in frame if c in KEYS], keep="last")
    print(show(frame))
    of_first = frame[frame["data"] == options.data[0].name]
    picture(of_first, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()

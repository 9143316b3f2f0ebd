"""NUTS as judge: how near variational guides come to the posterior of the gates.

Which library does a docstring's first sentence come from (see docstrings.py)? MiniLM's
mean-pooled features, computed once, go through a small head with LoRA of rank 8 on two
layers: 16 gates. Half of the sentences train A and B as plain LoRA. Then these are held
and the other half gives the gates their posterior, by NUTS and by four guides.

It exits with an error unless r-hat < 1.01 and ESS > 400 for every gate. The layers are
side by side: logits are linear in the gates, so the log likelihood is concave. (One
after the other, a tanh between, signs can change together: seed 1's chains disagreed.)

    python examples/nuts_reference.py --seed 0

writes nuts_reference.md and .png into examples/results, in five minutes on two cores.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import docstrings
import peft
import pyro
import torch
from matplotlib import pyplot as plt
from peft import LoraConfig, PeftModel, get_peft_model
from pyro.infer import MCMC, NUTS, SVI
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from text_data import MINILM, Encoded, Text
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModel

import lrvd_pyro as lrvd
from lrvd_pyro import guides, priors
from lrvd_pyro.inference.per_example import PerExample
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.predictive.draws import draw_latents

PER_LIBRARY, HIDDEN, RANK, LORA_STEPS = 110, 64, 8, 30
CHAINS, WARMUP, DRAWS, STEPS, PARTICLES = 4, 400, 500, 1000, 4
MAX_RHAT, MIN_ESS = 1.01, 400
TRACED = {"jit_compile": True, "ignore_jit_warnings": True}
PRIORS: dict[str, priors.Prior] = {
    "Normal(1.0)": priors.Normal(1.0),
    "Horseshoe(slab=2.0)": priors.Horseshoe(slab=2.0),
}
GUIDES: dict[str, Callable[[GateLoRA], Any]] = {
    "RankDiagonal": lambda model: guides.RankDiagonal(model, learn_mean=True),
    "low_rank_multivariate_normal": guides.low_rank_multivariate_normal,
    "multivariate_normal": guides.multivariate_normal,
    "laplace": guides.laplace,
}
FOOT = """\
Means over gates; distances in NUTS's standard deviations. NUTS's own row is two of its
chains against the other two: the noise of the judge.

Seed 0: under the Gaussian every guide is centered. Mean field is too sure, 0.88 of the
width of NUTS, 0.42 for a correlated gate, as NUTS's covariance says it must be; with a
covariance, or by Laplace, the widths are right. Under the horseshoe the Gaussian guides
are near; Laplace's mode is off by 0.2 sd. All of it is given A and B, held fixed.
"""
RESULTS = Path(__file__).parent / "results"
LABELS = [f"{layer}.{i}" for layer in ("wide", "deep") for i in range(RANK)]
Batch = dict[str, Tensor]
Results = dict[tuple[str, str], "Gates"]


class Gates(NamedTuple):
    """Draws of the gates, ``draws x R``, the seconds they took, and diagnostics."""

    draws: Tensor
    seconds: float
    note: str = ""

    def quantiles(self) -> Tensor:
        """5%, median and 95% of each gate, ``3 x R``."""
        return self.draws.quantile(torch.tensor([0.05, 0.5, 0.95]), 0)


class Head(nn.Module):
    """Features to logits, straight and by way of a fixed random layer."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, HIDDEN)
        self.wide = nn.Linear(features, classes)
        self.deep = nn.Linear(HIDDEN, classes)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.wide(x), self.deep(self.hidden(x).tanh()))


@torch.no_grad()
def features(data: Text) -> Tensor:
    """MiniLM's mean-pooled sentence vectors, each coordinate standardized."""
    net = AutoModel.from_pretrained(MINILM, dtype=torch.float32).eval()
    pooled = []
    for batch in Encoded(data, max_length=32).in_order():
        mask = batch["attention_mask"].unsqueeze(-1)
        states = net(**batch).last_hidden_state
        pooled.append((states * mask).sum(1) / mask.sum(1))
    x = torch.cat(pooled).double()
    return (x - x.mean(0)) / x.std(0)


def load_task(seed: int) -> list[Batch]:
    """Sentences for A and B, and others for the gates."""
    data, _ = docstrings.corpus(PER_LIBRARY)
    x, labels = features(data), torch.tensor(data.labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return [{"x": x[i], "labels": labels[i]} for i in order.tensor_split(2)]


def trained_head(batch: Batch, seed: int) -> PeftModel:
    """Plain LoRA, trained for a while and then frozen, so that its gates matter."""
    pyro.set_rng_seed(seed)
    x, labels = batch["x"], batch["labels"]
    head = Head(x.shape[1], int(labels.max()) + 1)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["wide", "deep"])
    net = get_peft_model(head, config)
    optim = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.1)
    for _ in range(LORA_STEPS):
        nn.functional.cross_entropy(net(x=x), labels).backward()
        optim.step()
        optim.zero_grad()
    return net.requires_grad_(False).eval()


def judge(model: GateLoRA, batch: Batch, seed: int) -> Gates:
    """The gates by NUTS, chain after chain; exits if it misses the bounds."""
    began, chains = time.perf_counter(), []
    for chain in range(CHAINS):
        pyro.set_rng_seed(CHAINS * seed + chain)
        kernel = NUTS(model, target_accept_prob=0.9, full_mass=True, **TRACED)
        mcmc = MCMC(kernel, num_samples=DRAWS, warmup_steps=WARMUP)
        mcmc.run(**batch)
        chains.append(model.value_at(mcmc.get_samples()))
    gates = torch.stack(chains)
    rhat = split_gelman_rubin(gates, chain_dim=0, sample_dim=1)
    ess = effective_sample_size(gates, chain_dim=0, sample_dim=1)
    if not (rhat.max() < MAX_RHAT and ess.min() > MIN_ESS):
        raise SystemExit(f"NUTS cannot judge here: r-hat {rhat}, ESS {ess}")
    note = f"r-hat at most {rhat.max():.4f}, ESS at least {ess.min():.0f}"
    return Gates(gates.flatten(0, 1), time.perf_counter() - began, note)


def fit(name: str, model: GateLoRA, batch: Batch, seed: int) -> Gates:
    """The gates by a guide, trained on all data at once."""
    pyro.set_rng_seed(seed)
    began = time.perf_counter()
    guide = GUIDES[name](model)
    optim = lrvd.optim.AdamW(schedule=lambda step: 1 - step / STEPS)
    elbo = lrvd.RankELBO(noise="batch", num_particles=PARTICLES)
    svi = SVI(model, guide, optim, loss=elbo)
    for _ in tqdm(range(STEPS), desc=name):
        svi.step(**batch)
    if name == "laplace":
        guide = guide.laplace_approximation([batch])
    with torch.no_grad(), PerExample(CHAINS * DRAWS):
        draws = model.value_at(draw_latents(model, guide, batch))
    return Gates(draws, time.perf_counter() - began)


def score(gates: Gates, truth: Gates) -> dict[str, str]:
    """Medians and interval widths next to those of ``truth``."""
    low, median, high = gates.quantiles()
    true_low, true_median, true_high = truth.quantiles()
    error = (median - true_median).abs() / truth.draws.std(0)
    width = (high - low) / (true_high - true_low)
    worst = int(error.argmax())
    return {
        "median off by (sd)": f"{error.mean():.2f}",
        "90% width / NUTS's": f"{width.mean():.2f}",
        "narrowest": f"{width.min():.2f}",
        "worst median": f"{LABELS[worst]}, {error[worst]:.2f} sd",
        "seconds": f"{gates.seconds:.0f}",
    }


def compare(results: Results) -> list[dict[str, str]]:
    """A row per prior and method; NUTS's is half of its chains against the rest."""
    rows = []
    for (prior, method), gates in results.items():
        truth = results[prior, "NUTS"]
        if gates is truth:
            half, rest = gates.draws.chunk(2)
            gates, truth = Gates(half, gates.seconds), Gates(rest, 0.0)
        rows.append({"prior": prior, "method": method} | score(gates, truth))
    return rows


def picture(results: Results, path: Path) -> None:
    """For each gate the 90% intervals next to one another, a panel per prior."""
    figure, axes = plt.subplots(len(PRIORS), figsize=(10, 7), layout="constrained")
    places = torch.arange(len(LABELS))
    for axis, prior in zip(axes, PRIORS):
        for i, method in enumerate(["NUTS", *GUIDES]):
            low, median, high = results[prior, method].quantiles()
            x, color = places + 0.15 * (i - 2), f"C{i - 1}" if i else "black"
            axis.vlines(x, low, high, color, label=method)
            axis.plot(x, median, "o", color=color, markersize=3)
        axis.set_xticks(places, LABELS, rotation=45)
        axis.set_title(f"gate, median and 90% interval, under {prior}", fontsize=10)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=90)


def write(results: Results, seed: int, out: Path) -> None:
    """The table, which is also printed, and the picture."""
    rows = compare(results)
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    versions = [f"{m.__name__} {m.__version__}" for m in (lrvd, torch, pyro, peft)]
    made = f"`examples/nuts_reference.py --seed {seed}`, {', '.join(versions)}"
    notes = "; ".join(f"under {p}, {results[p, 'NUTS'].note}" for p in PRIORS)
    text = f"# NUTS as judge\n\n{table}\n\nNUTS {notes}.\n{FOOT}\n{made}\n"
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    (out / "nuts_reference.md").write_text(text, encoding="utf-8")
    picture(results, out / "nuts_reference.png")


def main(argv: list[str] | None = None) -> None:
    """Run the judge and the guides; write what came of it."""
    parser = argparse.ArgumentParser(description="NUTS as judge of guides.")
    parser.add_argument("--seed", type=int, default=0, help="of data and noise; 0")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder")
    args = parser.parse_args(argv)
    # A KL by Monte Carlo is expected: no AutoGuide's has a closed form.
    warnings.filterwarnings("ignore", "no closed form", UserWarning)
    torch.set_num_threads(1)  # the matrices are small
    torch.set_default_dtype(torch.float64)
    for_lora, batch = load_task(args.seed)
    net = trained_head(for_lora, args.seed)
    results: Results = {}
    for name, prior in PRIORS.items():
        model = GateLoRA(net, prior=prior, num_data=len(batch["labels"]))
        results[name, "NUTS"] = judge(model, batch, args.seed)
        for guide in GUIDES:
            results[name, guide] = fit(guide, model, batch, args.seed)
    write(results, args.seed, args.out)


if __name__ == "__main__":
    main()

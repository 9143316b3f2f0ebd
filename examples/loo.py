"""Which prior predicts better? Leave-one-out between two proper priors.

Which library does a docstring's first sentence come from (see docstrings.py)? As in
nuts_reference.py, MiniLM's features go through a small head with LoRA; one part of the
sentences trains A and B, which are then held. A second part gives the gates their
posterior under each prior, and ArviZ compares the two by leave-one-out. That A and B
never saw this part is what makes the comparison fair. A third part, kept back, says
whether leave-one-out foretold right.

    python examples/loo.py --seed 0

takes half a minute on two cores.
"""

import argparse
import warnings
from typing import Any

import arviz as az
import pyro
import torch
from nuts_reference import RANK, Batch, load_task, trained_head
from peft import PeftModel
from pyro.infer import SVI
from tqdm import tqdm
from transformers.utils import logging

import lrvd_pyro as lrvd
from lrvd_pyro import priors
from lrvd_pyro.diagnostics.arviz import to_arviz
from lrvd_pyro.guides import multivariate_normal
from lrvd_pyro.models import GateLoRA

STEPS, SAMPLES, PARTICLES = 400, 1000, 4
PRIORS: dict[str, priors.Prior] = {
    "Normal(1.0)": priors.Normal(1.0),
    "Normal(0.1)": priors.Normal(0.1),
}


def posterior(
    net: PeftModel, prior: priors.Prior, batch: Batch, kept: Batch, seed: int
) -> tuple[Any, float]:
    """The gates in ArviZ, and the log predictive density of what was kept back."""
    pyro.set_rng_seed(seed)
    model = GateLoRA(net, prior=prior, num_data=len(batch["labels"]))
    guide = multivariate_normal(model)
    optim = lrvd.optim.AdamW(lr=1e-2, schedule=lambda step: 1 - step / STEPS)
    elbo = lrvd.RankELBO(noise="batch", num_particles=PARTICLES)
    svi = SVI(model, guide, optim, loss=elbo)
    for _ in tqdm(range(STEPS)):
        svi.step(**batch)
    probs = lrvd.predict(model, guide, [kept], SAMPLES).probs
    log_density = probs.gather(1, kept["labels"][:, None]).log().mean()
    return to_arviz(model, guide, [batch], SAMPLES), float(log_density)


def main(argv: list[str] | None = None) -> None:
    """Compare the priors; print what both criteria say."""
    parser = argparse.ArgumentParser(description="Leave-one-out between two priors.")
    parser.add_argument("--seed", type=int, default=0, help="of data and noise; 0")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", "no closed form", UserWarning)
    logging.set_verbosity_error()
    torch.set_default_dtype(torch.float64)
    for_lora, rest = load_task(args.seed)
    batch, kept = ({k: v[i::2] for k, v in rest.items()} for i in (0, 1))
    net = trained_head(for_lora, args.seed)
    fits = {n: posterior(net, p, batch, kept, args.seed) for n, p in PRIORS.items()}
    count = len(batch["labels"])
    print(f"\n{2 * RANK} gates, {count} sentences; log density in nats per sentence\n")
    print("| prior | leave-one-out | kept back | Pareto k > 0.7 |\n|---|---|---|---|")
    for name, (data, density) in fits.items():
        loo = az.loo(data, pointwise=True, reff=1)  # type: ignore[no-untyped-call]
        elpd = loo.elpd if hasattr(loo, "elpd") else loo.elpd_loo  # ArviZ 1, or 0.23
        high = int((loo.pareto_k > 0.7).sum())
        print(f"| {name} | {elpd / count:.3f} | {density:.3f} | {high} of {count} |")
    table = az.compare({name: data for name, (data, _) in fits.items()})
    difference, error = (table[c].iloc[1] / count for c in ("elpd_diff", "dse"))
    print(f"\n{table.index[0]} is better by {difference:.3f} ± {error:.3f}")


if __name__ == "__main__":
    main()

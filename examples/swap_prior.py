"""One network, one guide, every prior: change one argument.

On the quickstart's docstrings, three seeds, true ELBO, 8 samples. Priors with a scale
come with ``weight_prior=Normal(0, 1)`` on A and B, without which it would mean nothing.

    python examples/swap_prior.py --out examples/results/swap_prior.md
"""

import argparse
from functools import partial
from typing import Any

from pyro.distributions import HalfNormal, Normal
from quickstart import lora_network
from quickstart_task import Task
from swapping import compare, fit, score

from lrvd_pyro import priors
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA

PRIORS: dict[str, tuple[Any, Any]] = {
    "LogUniform": (priors.LogUniform, None),
    "LogUniform, multiplicity 8": (partial(priors.LogUniform, 8.0), None),
    "TruncatedLogUniform": (priors.TruncatedLogUniform, None),
    "ARD": (priors.ARD, None),
    "Normal": (priors.Normal, Normal(0.0, 1.0)),
    "Horseshoe": (priors.Horseshoe, Normal(0.0, 1.0)),
    "Horseshoe, slab 2": (partial(priors.Horseshoe, slab=2.0), Normal(0.0, 1.0)),
    "Hierarchical HalfNormal": (
        partial(priors.Hierarchical, HalfNormal, "module"),
        Normal(0.0, 1.0),
    ),
    "SpikeSlab": (priors.SpikeSlab, Normal(0.0, 1.0)),
}


def run(name: str, task: Task, args: argparse.Namespace) -> dict[str, float]:
    """Train under the prior of that name and score on test."""
    prior, weight_prior = PRIORS[name]
    model = GateLoRA(
        lora_network(task, args),
        prior=prior(),
        weight_prior=weight_prior,
        num_data=len(task.train),
    )
    guide = RankDiagonal(model)
    seconds = fit(name, model, guide, task, args)
    return score(model, guide, task, args) | {"seconds": seconds}


def main(argv: list[str] | None = None) -> None:
    """Compare all priors."""
    compare("Priors", {name: partial(run, name) for name in PRIORS}, argv)


if __name__ == "__main__":
    main()

"""One network, one prior, every guide: change one argument.

On the quickstart's docstrings, three seeds, true ELBO, 8 samples. The prior is
``Normal(0, 1)`` on the gates and on the elements of A and B: proper, as point estimates
and flows need it.

    python examples/swap_guide.py --out examples/results/swap_guide.md
"""

import argparse
import warnings
from functools import partial
from typing import Any

from pyro.distributions import Normal
from pyro.infer.autoguide import AutoNormal, init_to_value
from quickstart import lora_network
from quickstart_task import Task
from swapping import compare, fit, score

from lrvd_pyro import guides, priors
from lrvd_pyro.inference.param_store import give_own_name
from lrvd_pyro.models import GateLoRA


def auto_normal(model: GateLoRA) -> AutoNormal:
    """Any of Pyro's AutoGuides will do: start it at gate 1, give it a name."""
    start = init_to_value(values=model.start())
    return give_own_name(AutoNormal(model, init_loc_fn=start, init_scale=0.1))


GUIDES: dict[str, Any] = {
    "RankDiagonal": guides.RankDiagonal,
    "RankDiagonal, learned mean": partial(guides.RankDiagonal, learn_mean=True),
    "AutoNormal": auto_normal,
    "delta": guides.delta,
    "laplace": guides.laplace,
    "low_rank_multivariate_normal": guides.low_rank_multivariate_normal,
    "multivariate_normal": guides.multivariate_normal,
    "iaf": guides.iaf,
}


def run(name: str, task: Task, args: argparse.Namespace) -> dict[str, float]:
    """Train the guide of that name and score on test."""
    model = GateLoRA(
        lora_network(task, args),
        prior=priors.Normal(),
        weight_prior=Normal(0.0, 1.0),
        num_data=len(task.train),
    )
    guide = GUIDES[name](model)
    with warnings.catch_warnings():
        # joint guides have no closed form, as examples/results/README.md says
        warnings.filterwarnings("ignore", "no closed form", UserWarning)
        seconds = fit(name, model, guide, task, args)
    if name == "laplace":
        guide = guide.laplace_approximation(list(task.train.in_order()))
    return score(model, guide, task, args) | {"seconds": seconds}


def main(argv: list[str] | None = None) -> None:
    """Compare all guides."""
    compare("Guides", {name: partial(run, name) for name in GUIDES}, argv)


if __name__ == "__main__":
    main()

"""Add a benchmark row: from a task to columns. Here: the prior of add_prior.py."""

from argparse import Namespace
from functools import partial

from pyro.distributions import Normal
from quickstart import lora_network
from quickstart_task import Task
from recipes.add_prior import laplace
from swap_prior import run
from swapping import compare, fit, score

from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA


def row(task: Task, args: Namespace) -> dict[str, float]:
    """Train on the sentences of one seed; score on its test sentences."""
    net, on_weights = lora_network(task, args), Normal(0.0, 1.0)
    model = GateLoRA(
        net, prior=laplace, weight_prior=on_weights, num_data=len(task.train)
    )
    guide = RankDiagonal(model)
    seconds = fit("Laplace", model, guide, task, args)
    return score(model, guide, task, args) | {"seconds": seconds}


if __name__ == "__main__":
    compare("Priors", {"Normal": partial(run, "Normal"), "Laplace": row}, None)

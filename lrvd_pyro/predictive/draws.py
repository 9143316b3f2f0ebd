"""Draws of the latent variables: from a guide, or given by the caller."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from pyro import poutine
from torch import Tensor

from lrvd_pyro.batches import Batch
from lrvd_pyro.inference.kl import latent_sites
from lrvd_pyro.inference.param_store import waits_for_first_call
from lrvd_pyro.inference.programs import Guide
from lrvd_pyro.inference.threads import alone_in_pyro
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.threads import one_at_a_time

__all__ = [
    "bound_values",
    "check_ready",
    "draw_latents",
    "posterior_draws",
    "seeded",
    "unstack",
]

_Latents = dict[str, Tensor]  # one draw: the value of each latent site


def posterior_draws(
    model: RankModel,
    guide: Guide | None,
    batch: Batch,
    num_samples: int,
    posterior_samples: Mapping[str, Tensor] | None,
) -> list[_Latents]:
    """The caller's draws if there are any, else ``num_samples`` draws of the guide.

    Raises:
        ValueError: As `unstack` or `check_ready` raises it.
    """
    if posterior_samples is not None:
        return unstack(posterior_samples)
    return [draw_latents(model, guide, batch) for _ in range(num_samples)]


@alone_in_pyro()
def draw_latents(model: RankModel, guide: Guide | None, batch: Batch) -> _Latents:
    """One draw of every latent site from the guide.

    Raises:
        ValueError: As `check_ready` raises it.
    """
    check_ready(guide)
    trace = poutine.trace(guide).get_trace(**batch)
    return {name: site["value"] for name, site in latent_sites(trace).items()}


def check_ready(guide: Guide | None) -> None:
    """Raise a ValueError unless there is a guide that has its parameters."""
    if waits_for_first_call(guide):
        raise ValueError(
            f"{type(guide).__name__} has no parameters yet; train it first, "
            f"svi.step(**batch), or call guide(**batch) once"
        )
    if guide is None:
        raise ValueError("guide is None; give a guide or posterior_samples")


def bound_values(model: RankModel, draws: Iterable[_Latents]) -> Tensor:
    """What the model binds under each draw: gates ``S x R``, or weights ``S x K``."""
    return torch.stack([model.value_at(latents).detach() for latents in draws])


def unstack(samples: Mapping[str, Tensor]) -> list[_Latents]:
    """One dict per draw, from samples by site whose first axis runs over the draws.

    Raises:
        ValueError: If a site has other axes than draws and size, or the sites differ in
            the number of draws.
    """
    # `Predictive` adds the model's return value under this name.
    latents = {name: v for name, v in samples.items() if name != "_RETURN"}
    shapes = {name: tuple(v.shape) for name, v in latents.items()}
    # `Predictive` returns S x 1 x R for a site of one event dimension: the data plate
    # leaves an axis of length 1. Any longer axis in its place has another meaning.
    plain = all(v.dim() > 1 and v[0].numel() == v.shape[-1] for v in latents.values())
    if not plain or len({shape[0] for shape in shapes.values()}) != 1:
        raise ValueError(
            f"posterior_samples have shapes {shapes}; expected draws x size for every "
            f"latent site, the same number of draws (MCMC: group_by_chain=False)"
        )
    count = len(next(iter(latents.values())))
    return [{k: v[s].reshape(-1) for k, v in latents.items()} for s in range(count)]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from this seed within the block; the random state is restored after it."""
    # the random state is common to all threads
    with one_at_a_time(), torch.random.fork_rng():
        torch.manual_seed(seed)
        yield

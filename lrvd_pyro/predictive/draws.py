"""Draws of the latent variables from a guide, or as they were given."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from lrvd_pyro.inference.kl import latent_sites
from lrvd_pyro.inference.param_store import waits_for_first_call
from lrvd_pyro.inference.programs import Guide
from lrvd_pyro.models.base import RankModel

Latents = dict[str, Tensor]


def posterior_draws(
    model: RankModel,
    guide: Guide | None,
    batch: Any,
    num_samples: int,
    posterior_samples: Mapping[str, Tensor] | None,
) -> list[Latents]:
    """The draws that were given, or as many of the guide's."""
    if posterior_samples is not None:
        return unstack(posterior_samples)
    return [draw_latents(model, guide, batch) for _ in range(num_samples)]


def draw_latents(model: RankModel, guide: Guide | None, batch: Any) -> Latents:
    """One draw of every latent site from the guide."""
    check_ready(guide)
    trace = poutine.trace(guide).get_trace(**batch)
    return {name: site["value"] for name, site in latent_sites(trace).items()}


def check_ready(guide: Guide | None) -> None:
    if waits_for_first_call(guide):
        raise ValueError(
            f"{type(guide).__name__} has no parameters yet; train it first, "
            f"svi.step(**batch), or call guide(**batch) once"
        )
    if guide is None:
        raise ValueError("guide is None; give a guide or posterior_samples")


def bound_values(model: RankModel, draws: Iterable[Latents]) -> Tensor:
    """What the model binds under each draw, S x R (S x K for weights)."""
    return torch.stack([model.value_at(latents).detach() for latents in draws])


def unstack(samples: Mapping[str, Tensor]) -> list[Latents]:
    """One dict per draw; Pyro's singleton plate axes are dropped."""
    latents = {name: v for name, v in samples.items() if name != "_RETURN"}
    shapes = {name: tuple(v.shape) for name, v in latents.items()}
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
    """Draw from this seed within the block; the random state is restored."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield

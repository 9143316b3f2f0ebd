"""Draws of the latent variables: from a guide, or given by the caller."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution

from lrvd_pyro.batches import Batch
from lrvd_pyro.inference.kl import latent_sites
from lrvd_pyro.inference.pairs import paired
from lrvd_pyro.inference.param_store import check_name_is_free, waits_for_first_call
from lrvd_pyro.inference.per_example import drawn_per_example
from lrvd_pyro.inference.programs import Guide
from lrvd_pyro.inference.threads import alone_in_pyro
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.threads import one_at_a_time

__all__ = [
    "bound_values",
    "draw_latents",
    "guide_draws",
    "posterior_draws",
    "ready",
    "seeded",
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
        ValueError: As `_unstack` or `guide_draws` raises it.
    """
    if posterior_samples is None:
        return [*guide_draws(model, guide, batch, num_samples)]
    draws = _unstack(posterior_samples)
    # `Predictive` gives more than the latent sites. One that lacks is refused later.
    common = {n: fn for n, fn in model.latent_sites().items() if n in draws[0]}
    _check_sites(common, {name: draws[0][name] for name in common})
    return draws


def guide_draws(
    model: RankModel, guide: Guide | None, batch: Batch, count: int
) -> Iterator[_Latents]:
    """Draws of every latent site from the guide, one after another.

    Raises:
        TypeError: As `paired` raises it.
        ValueError: If the guide has no parameters yet, was built on another model, or
            draws other sites than the model has.
        RuntimeError: If the guide is a copy of an AutoGuide, or another one, that has
            no name of its own.
    """
    guide = ready(model, guide)
    for number in range(count):
        latents = _draw(guide, batch)
        if number == 0:
            _check_sites(model.latent_sites(), latents)
        yield latents


def draw_latents(model: RankModel, guide: Guide | None, batch: Batch) -> _Latents:
    """One draw of every latent site; raises as `guide_draws` does."""
    return next(guide_draws(model, guide, batch, 1))


@alone_in_pyro()
def _draw(guide: Guide, batch: Batch) -> _Latents:
    trace = poutine.trace(guide).get_trace(**batch)
    return {
        name: site["value"]
        for name, site in latent_sites(trace).items()
        if not site["infer"].get("is_auxiliary")
    }


def _check_sites(sites: Mapping[str, Distribution], latents: _Latents) -> None:
    """Raise unless one draw has a value of the right shape for every latent site."""
    expected = {name: tuple(fn.event_shape) for name, fn in sites.items()}
    rows = int(drawn_per_example())  # the axis of examples comes first
    found = {name: tuple(value.shape[rows:]) for name, value in latents.items()}
    if found != expected:
        raise ValueError(
            f"the draws have the latent sites {found} and the model {expected}; a "
            f"guide or posterior_samples of another model do not fit: pass those of "
            f"this one, or train RankDiagonal(model)"
        )


def ready(model: RankModel, guide: Guide | None) -> Guide:
    """The guide as it reads this model, checked to have its parameters."""
    if waits_for_first_call(guide):
        raise ValueError(
            f"{type(guide).__name__} has no parameters yet; train it first, "
            f"svi.step(**batch), or call guide(**batch) once"
        )
    if guide is None:
        raise ValueError("guide is None; give a guide or posterior_samples")
    check_name_is_free(guide)
    return paired(model, guide)


def bound_values(model: RankModel, draws: Iterable[_Latents]) -> Tensor:
    """What the model binds under each draw: gates ``S x R``, or weights ``S x K``."""
    return torch.stack([model.value_at(latents).detach() for latents in draws])


def _unstack(samples: Mapping[str, Tensor]) -> list[_Latents]:
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

"""Predictions under the posterior: streamed, under one draw, or at the mean."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from peft import PeftModel
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from lrvd_pyro.divergence import latent_sites
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.naming import waits_for_first_call
from lrvd_pyro.noise import batch_size

Latents = dict[str, Tensor]
Batch = dict[str, Any]
Guide = Callable[..., Any]


def predict(
    model: RankModel,
    guide: Guide | None,
    batches: Iterable[Mapping[str, Any]],
    num_samples: int = 16,
    *,
    posterior_samples: Mapping[str, Tensor] | None = None,
    return_samples: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Any:
    """The posterior predictive, the mean over S draws of the adapter.

    ``p(y | x) = 1/S sum_s p(y | x, z_s)``, the same S draws for every batch. The
    network runs in eval mode and without gradients; its mode and the random state are
    restored.

    Example::

        prediction = predict(model, guide, [tokenizer(texts, return_tensors="pt")])
        prediction.probs, prediction.mutual_information

    Args:
        model: The trained model.
        guide: Its guide. May be None if ``posterior_samples`` are given.
        batches: Dicts of tensors as the model takes them; labels are ignored.
        num_samples: The number of draws S.
        posterior_samples: Draws to use instead of the guide's, by site, the first axis
            over S: from `pyro.infer.Predictive` or MCMC. S is theirs.
        return_samples: Keep each draw's prediction, ``S x n x ...``.
        seed: Of the draws.
        progress: Show a bar over the batches.

    Returns:
        A `CategoricalPrediction` or `NormalPrediction`, as the likelihood has it.

    Raises:
        TypeError: If ``batches`` is one batch, or a batch holds no tensor.
        ValueError: If there is no batch, ``num_samples`` is below 1, the guide has no
            parameters yet, or the draws lack a latent site or differ in number.
    """
    inputs = _without_labels(batches)
    first = next(inputs, None)
    if first is None or num_samples < 1:
        raise ValueError(
            f"got {0 if first is None else 'some'} batches and "
            f"num_samples={num_samples}; expected at least one of each: "
            f"predict(model, guide, [batch], num_samples=16)"
        )
    fields: dict[str, list[Tensor]] = {}
    with evaluating(model), torch.no_grad(), _seeded(seed):
        draws = posterior_draws(model, guide, first, num_samples, posterior_samples)
        values = [model.value_at(latents).detach() for latents in draws]
        rest = tqdm(chain([first], inputs), disable=not progress, desc="predict")
        for batch in rest:
            outputs = torch.stack([_outputs(model, value, batch) for value in values])
            for name, field in model.likelihood.summarise(outputs).items():
                if name != "samples" or return_samples:
                    fields.setdefault(name, []).append(field)
    return model.likelihood.collect({k: torch.cat(v) for k, v in fields.items()})


@contextmanager
def posterior_sample(
    model: RankModel, guide: Guide, *, seed: int
) -> Iterator[PeftModel]:
    """Run the network under one draw from the posterior within the block.

    Anything of Transformers works there, ``generate`` too::

        with posterior_sample(model, guide, seed=0) as net:
            net.generate(**prompt)

    Args:
        model: The trained model.
        guide: Its guide, which must not look at the batch.
        seed: Of the draw; the random state is restored.
    """
    with torch.no_grad(), _seeded(seed):
        value = model.value_at(draw_latents(model, guide, {}))
    with model.bind(value):
        yield model.base_net


@contextmanager
def posterior_mean(
    model: RankModel, guide: Guide, *, num_samples: int = 1000
) -> Iterator[PeftModel]:
    """Run the network at the posterior mean of its adapter within the block.

    Exact for guides with a method ``mean`` (`RankDiagonal`); for others the mean of
    ``num_samples`` draws of the guide, which cost no forward pass.
    """
    with torch.no_grad(), _seeded(0):
        if hasattr(guide, "mean"):
            value = guide.mean()
        else:
            draws = (draw_latents(model, guide, {}) for _ in range(num_samples))
            value = torch.stack([model.value_at(z) for z in draws]).mean(0)
    with model.bind(value):
        yield model.base_net


def posterior_draws(
    model: RankModel,
    guide: Guide | None,
    batch: Any,
    num_samples: int,
    posterior_samples: Mapping[str, Tensor] | None,
) -> list[Latents]:
    """The draws that were given, or as many of the guide's."""
    if posterior_samples is not None:
        return _unstack(posterior_samples)
    return [draw_latents(model, guide, batch) for _ in range(num_samples)]


def draw_latents(model: RankModel, guide: Guide | None, batch: Any) -> Latents:
    """One draw of every latent site from the guide."""
    if waits_for_first_call(guide):
        raise ValueError(
            f"{type(guide).__name__} has no parameters yet; train it first, "
            f"svi.step(**batch), or call guide(**batch) once"
        )
    if guide is None:
        raise ValueError("guide is None; give a guide or posterior_samples")
    trace = poutine.trace(guide).get_trace(**batch)
    return {name: site["value"] for name, site in latent_sites(trace).items()}


def _without_labels(batches: Iterable[Mapping[str, Any]]) -> Iterator[Batch]:
    if isinstance(batches, Mapping):
        raise TypeError("batches is one batch; expected several: predict(..., [batch])")
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        batch_size(inputs)
        yield inputs


def _outputs(model: RankModel, value: Tensor, batch: Mapping[str, Any]) -> Tensor:
    with model.bind(value):
        return model.predictions(**batch)


def _unstack(samples: Mapping[str, Tensor]) -> list[Latents]:
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
def evaluating(model: RankModel) -> Iterator[None]:
    """Run the network in eval mode within the block; its mode is restored."""
    was_training = [m for m in model.base_net.modules() if m.training]
    model.base_net.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield

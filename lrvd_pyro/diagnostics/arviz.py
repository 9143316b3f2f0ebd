"""The posterior as ArviZ has it, with names for every rank component."""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from lrvd_pyro.batches import batch_size, opened, without_labels
from lrvd_pyro.inference.programs import Guide
from lrvd_pyro.likelihoods.base import precise
from lrvd_pyro.models.base import RankModel, evaluating
from lrvd_pyro.predictive.draws import posterior_draws, seeded
from lrvd_pyro.rank_space.space import RankSpace

Variables = dict[str, tuple[tuple[str, ...], Any]]
Coords = dict[str, dict[str, list[Any]]]
SAMPLE = ("chain", "draw")
DATUM = "datum_id"


def to_arviz(
    model: RankModel,
    guide: Guide | None,
    batches: Iterable[Mapping[str, Any]],
    num_samples: int = 200,
    *,
    seed: int = 0,
    posterior_samples: Mapping[str, Tensor] | None = None,
) -> Any:
    """Draws of the posterior, and what they say of labeled data, for ArviZ.

    Groups: ``posterior``, every latent site of the prior and ``gate``;
    ``posterior_predictive``, ``labels`` drawn anew; ``log_likelihood``, ``log p(y_i |
    x_i, z_s)`` of each datum under each draw in nats, not scaled to the data set;
    ``observed_data``, the labels; ``constant_data``, the guide's ``log_alpha`` if it
    has one. A vector with one entry per rank component has the dimension ``gate_id``,
    labeled as "l0.attention.self.query[3]", with the coordinates ``module``,
    ``layer``, ``type`` and ``rank`` along it. A site ``module_scale`` has the dimension
    ``module_id``; likewise layer, type and global. `FactorLoRA`'s ``factor`` has
    ``weight_id``, with the same coordinates and ``side``.

    The draws stand in one chain and are independent if a guide made them: r-hat and
    ESS say nothing, so ``az.summary(data, kind="stats")`` and ``az.loo(data, reff=1)``.
    MCMC's chains are laid end to end; take r-hat and ESS from ``mcmc.diagnostics()``,
    and give ``az.loo`` the ESS per draw as ``reff``.

    Wrong as an estimate of prediction where A, B or the head were trained on the same
    data: leave-one-out leaves a datum out of the posterior, and not out of the point
    parameters. It also takes the guide for the posterior.

    Memory is ``num_samples`` numbers per datum, twice, and one batch's logits.

    Example::

        data = to_arviz(model, guide, train_batches)
        az.loo(data, reff=1)
        az.plot_forest(data.posterior.where(data.posterior.layer == 3, drop=True))

    Args:
        model: The trained model.
        guide: Its guide. May be None if ``posterior_samples`` are given.
        batches: Dicts of tensors as the model takes them, with labels.
        num_samples: The number of draws S.
        seed: Of the draws, which are those of `lrvd_pyro.predict` at this seed.
        posterior_samples: Draws to use instead of the guide's, by site, the first axis
            over S: from `pyro.infer.Predictive` or MCMC. S is theirs.

    Returns:
        An ``arviz.InferenceData``; from ArviZ 1 on, an ``xarray.DataTree``.

    Raises:
        ImportError: Without the ``arviz`` extra.
        TypeError: If ``batches`` is one batch, or a batch holds no tensor.
        ValueError: If there is no batch, a batch has no labels, ``num_samples`` is
            below 1, the guide has no parameters yet, or the draws lack a latent site
            or differ in number.
    """
    container = _container()
    call = "to_arviz(model, guide, [batch], num_samples=200)"
    stream = opened(batches, num_samples, call)
    first = next(stream)
    with evaluating(model), torch.no_grad(), seeded(seed):
        inputs, _ = _parted(first)
        draws = posterior_draws(model, guide, inputs, num_samples, posterior_samples)
        values = [model.value_at(latents).detach() for latents in draws]
        parts = [_on_batch(model, values, batch) for batch in chain([first], stream)]
        names = model.latent_sites()
    labels, drawn, log_likelihood = (torch.cat(part, -1) for part in zip(*parts))
    latents = {name: torch.stack([z[name] for z in draws]) for name in names}
    if model.binds == "gates":
        latents["gate"] = torch.stack(values)
    sites = {name: _dimension(model, name, x) for name, x in latents.items()}
    groups: dict[str, Variables] = {
        "posterior": {name: _drawn(x, sites[name]) for name, x in latents.items()},
        "posterior_predictive": {"labels": _drawn(drawn, DATUM)},
        "log_likelihood": {"labels": _drawn(log_likelihood, DATUM)},
        "observed_data": {"labels": ((DATUM,), _array(labels))},
    }
    log_alpha = getattr(guide, "log_alpha", None)
    if log_alpha is not None:
        groups["constant_data"] = {"log_alpha": (("gate_id",), _array(log_alpha))}
    coords = _coordinates(model, sites)
    return container({name: _dataset(group, coords) for name, group in groups.items()})


def _container() -> Callable[[dict[str, Any]], Any]:
    """What makes the data of all groups one object, in the ArviZ at hand."""
    try:
        import arviz
    except ImportError as error:
        raise ImportError(
            "to_arviz needs ArviZ: pip install 'lrvd_pyro[arviz]'"
        ) from error
    if int(arviz.__version__.split(".")[0]) < 1:
        return lambda groups: arviz.InferenceData(**groups)
    from xarray import DataTree

    return DataTree.from_dict


def _parted(batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Inputs and labels."""
    batch_size(dict(batch))
    labels = batch.get("labels")
    if labels is None:
        raise ValueError(
            f"the batch {sorted(batch)} has no labels, of which the log likelihood "
            f"would be; give labeled batches, or use lrvd_pyro.predict"
        )
    return without_labels(batch), labels


def _on_batch(
    model: RankModel, values: list[Tensor], batch: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels (B,); labels drawn and log likelihood, ``S x B``; all on the CPU."""
    inputs, labels = _parted(batch)
    found = [_under_one_draw(model, value, inputs, labels) for value in values]
    drawn, log_likelihood = (torch.stack(each) for each in zip(*found))
    return labels.cpu(), drawn, log_likelihood


def _under_one_draw(
    model: RankModel, value: Tensor, inputs: dict[str, Any], labels: Tensor
) -> tuple[Tensor, Tensor]:
    with model.bind(value):
        predictions = model.predictions(**inputs)
    with poutine.block(), poutine.trace() as run:
        model.likelihood(predictions, labels, len(labels))
    site: Any = run.trace.nodes["labels"]
    log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
    return site["fn"].sample().cpu(), log_prob.cpu()


def _dimension(model: RankModel, site: str, values: Tensor) -> str:
    """The name of the axis of a latent site."""
    level, size = site.removesuffix("_scale"), values.shape[-1]
    if labels := model.site_labels(site):
        return labels[0]
    if site != level and len(_groups(model.space).get(level, ())) == size:
        return f"{level}_id"
    return "gate_id" if size == model.space.size else f"{site}_id"


def _groups(space: RankSpace) -> dict[str, list[Any]]:
    """The names of the groups at each level, in the order of `RankSpace.group`."""
    names = {
        level: list(dict.fromkeys(space.coordinates[level]))
        for level in ("module", "layer", "type")
    }
    return {"global": ["all"], **names}


def _coordinates(model: RankModel, sites: Iterable[str]) -> Coords:
    """For each dimension the coordinates along it, its own labels first."""
    space = model.space
    places = {name: [*each] for name, each in space.coordinates.items()}
    coords: Coords = {"gate_id": {"gate_id": _gate_labels(space), **places}}
    coords |= {f"{k}_id": {f"{k}_id": names} for k, names in _groups(space).items()}
    return coords | dict(filter(None, map(model.site_labels, sites)))


def _gate_labels(space: RankSpace) -> list[str]:
    """ "l0.attention.self.query[3]", or with the module's name if that is ambiguous."""
    places = space.coordinates
    short = {
        module: kind if layer == -1 else f"l{layer}.{kind}"
        for module, layer, kind in zip(
            places["module"], places["layer"], places["type"]
        )
    }
    if len(set(short.values())) < len(short):
        short = {module: str(module) for module in short}
    return [f"{short[m]}[{i}]" for m, i in zip(places["module"], places["rank"])]


def _drawn(values: Tensor, dimension: str) -> tuple[tuple[str, ...], Any]:
    """``S x ...`` draws as a variable in one chain."""
    return (*SAMPLE, dimension), _array(values)[None]


def _dataset(variables: Variables, coords: Coords) -> Any:
    """An xarray Dataset, every dimension with its coordinates."""
    import xarray

    used: dict[str, Any] = {}
    for dims, values in variables.values():
        for dim, size in zip(dims, values.shape):
            named = {dim: range(size)} | coords.get(dim, {})
            used |= {name: (dim, [*each]) for name, each in named.items()}
    return xarray.Dataset(variables, used)


def _array(tensor: Tensor) -> Any:
    return precise(tensor.detach()).cpu().numpy()

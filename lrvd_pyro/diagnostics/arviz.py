"""The posterior in ArviZ, with names for every rank component."""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from lrvd_pyro.batches import (
    Batch,
    batch_size,
    check_alike,
    opened,
    without_labels,
)
from lrvd_pyro.inference.pairs import paired
from lrvd_pyro.inference.programs import Guide
from lrvd_pyro.inference.terms import log_prob_by_datum
from lrvd_pyro.inference.threads import alone_in_pyro
from lrvd_pyro.likelihoods.base import precise
from lrvd_pyro.models.base import RankModel, evaluating
from lrvd_pyro.predictive.draws import posterior_draws, seeded
from lrvd_pyro.rank_space.space import RankSpace

__all__ = ["to_arviz"]

_Variables = dict[str, tuple[tuple[str, ...], Any]]  # dimensions and values, by name
_Coords = dict[str, dict[str, list[Any]]]  # coordinates by name, by dimension

_SAMPLE = ("chain", "draw")
_DATUM = "datum_id"


def to_arviz(
    model: RankModel,
    guide: Guide | None,
    batches: Iterable[Batch],
    num_samples: int = 200,
    *,
    seed: int = 0,
    posterior_samples: Mapping[str, Tensor] | None = None,
    test_batches: Iterable[Batch] | None = None,
) -> Any:
    """Give draws of the posterior, and what they say of labeled data, to ArviZ.

    The groups are

    - ``posterior``: every latent site of the prior, and ``gate``;
    - ``posterior_predictive``: ``labels``, drawn under each draw;
    - ``log_likelihood``: ``log p(y_i | x_i, z_s)`` of each datum under each draw, in
      nats, not scaled to the data set;
    - ``observed_data``: the labels. Several labels of one datum, as of tokens, have the
      further dimensions ``labels_dim_0`` and so on; their log likelihoods add up;
    - ``test_posterior_predictive``, ``test_log_likelihood`` and ``test_observed_data``:
      the same three of ``test_batches``, under the same draws;
    - ``constant_data``: the guide's ``log_alpha``, if it has one.

    A vector with one entry per rank component has the dimension ``gate_id``, labeled as
    "l0.attention.self.query[3]". The coordinates ``module``, ``layer``, ``type`` and
    ``rank`` run along it. A site ``module_scale`` has the dimension ``module_id``; the
    levels layer, type and global likewise. `FactorLoRA`'s ``factor`` has ``weight_id``,
    with the same coordinates and ``side``.

    Draws stand in one chain. Those of a guide are independent, so r-hat and ESS say
    nothing: call ``az.summary(data, kind="stats")`` and ``az.loo(data, reff=1)``.
    Chains of MCMC are laid end to end: take r-hat and ESS from ``mcmc.diagnostics()``,
    and give ``az.loo`` the ESS per draw as ``reff``.

    Leave-one-out is about the data of the posterior: ``batches`` are the training set,
    and ``az.loo`` reads ``log_likelihood`` alone. Other data go into ``test_batches``.

    Wrong as an estimate of prediction where A, B or the head were trained on the same
    data: leave-one-out removes a datum from the posterior, but not from the point
    parameters. It also takes the guide for the posterior.

    Memory is ``num_samples`` numbers per datum, twice, and the logits of one batch.
    Pareto k above ``1 - 1 / log10(num_samples)`` in ``az.loo`` asks for more draws.

    Example::

        data = to_arviz(model, guide, train_batches, test_batches=test_batches)
        az.loo(data, reff=1)
        az.plot_forest(data.posterior.where(data.posterior.layer == 3, drop=True))

    Args:
        model: The trained model.
        guide: Its guide; may be None with ``posterior_samples``.
        batches: Dicts of tensors as the model takes them, with labels.
        num_samples: The number of draws S.
        seed: The seed; draws are those of `lrvd_pyro.predict` at the same seed.
        posterior_samples: Draws to use instead of the guide's, from
            `pyro.infer.Predictive` or MCMC: ``S x size`` by site. S is then theirs.
        test_batches: Labeled batches that the posterior has not seen.

    Returns:
        An ``arviz.InferenceData``; from ArviZ 1 on, an ``xarray.DataTree``.

    Raises:
        ImportError: Without the ``arviz`` extra.
        TypeError: If ``batches`` is one batch, or a batch is not a mapping or holds no
            tensor.
        ValueError: If there is no batch; if a batch has no labels, or labels of another
            shape per datum than the first one; if the likelihood has no site
            ``labels``, or one without a row per datum; if ``num_samples`` is below 1;
            if the guide has no parameters yet or was built on another model; or if the
            draws lack a latent site or differ in number.
    """
    container = _container()
    guide = paired(model, guide)
    call = "to_arviz(model, guide, [batch], num_samples=200)"
    stream = opened(batches, num_samples, call)
    first = next(stream)
    with evaluating(model), torch.no_grad(), seeded(seed):
        inputs, _ = _parted(first)
        draws = posterior_draws(model, guide, inputs, num_samples, posterior_samples)
        values = [model.value_at(latents).detach() for latents in draws]
        about = _about_data(model, values, chain([first], stream))
        if test_batches is not None:
            unseen = _about_data(model, values, opened(test_batches, num_samples, call))
            about |= {f"test_{name}": group for name, group in unseen.items()}
        names = model.latent_sites()
    latents = {name: torch.stack([z[name] for z in draws]) for name in names}
    if model.binds == "gates":
        latents["gate"] = torch.stack(values)
    sites = {name: _dimension(model, name, x) for name, x in latents.items()}
    groups: dict[str, _Variables] = {
        "posterior": {name: _drawn(x, sites[name]) for name, x in latents.items()},
        **about,
    }
    log_alpha = getattr(guide, "log_alpha", None)
    if log_alpha is not None:
        groups["constant_data"] = {"log_alpha": (("gate_id",), _array(log_alpha))}
    coords = _coordinates(model, sites)
    return container({name: _dataset(group, coords) for name, group in groups.items()})


def _container() -> Callable[[dict[str, Any]], Any]:
    """The function that joins all groups in one object, in the installed ArviZ."""
    try:
        import arviz
    except ImportError as error:
        raise ImportError(
            "to_arviz needs ArviZ: pip install 'lrvd_pyro[arviz]'"
        ) from error
    if int(arviz.__version__.split(".")[0]) < 1:
        # The constructor, since ``from_dict`` has another signature in each version.
        return lambda groups: arviz.InferenceData(**groups)
    from xarray import DataTree

    return DataTree.from_dict


def _parted(batch: Batch) -> tuple[dict[str, Any], Tensor]:
    """The inputs and the labels of a batch."""
    batch_size(batch)
    labels = batch.get("labels")
    if labels is None:
        raise ValueError(
            f"the batch {sorted(batch)} has no labels, and the log likelihood needs "
            f"them; give labeled batches, or use lrvd_pyro.predict"
        )
    return without_labels(batch), labels


def _about_data(
    model: RankModel, values: list[Tensor], batches: Iterable[Batch]
) -> dict[str, _Variables]:
    """The groups that say something of each datum."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in batches:
        _, labels = _parted(batch)
        check_alike("labels", parts[0][0] if parts else labels, labels)
        parts.append(_on_batch(model, values, batch))
    labels = torch.cat([part[0] for part in parts])
    drawn, log_likelihood = (torch.cat([p[i] for p in parts], 1) for i in (1, 2))
    return {
        "posterior_predictive": {"labels": _drawn(drawn, *_data_dims(drawn[0]))},
        "log_likelihood": {"labels": _drawn(log_likelihood, _DATUM)},
        "observed_data": {"labels": (_data_dims(labels), _array(labels))},
    }


def _on_batch(
    model: RankModel, values: list[Tensor], batch: Batch
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, ``B x ...``; drawn ones, ``S x B x ...``; log likelihoods, ``S x B``.

    All are on the CPU.
    """
    inputs, labels = _parted(batch)
    draws = [_under_one_draw(model, value, inputs, labels) for value in values]
    drawn, log_likelihood = (torch.stack(each) for each in zip(*draws))
    return labels.cpu(), drawn, log_likelihood


def _under_one_draw(
    model: RankModel, value: Tensor, inputs: dict[str, Any], labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Drawn labels, ``B x ...``, and log likelihood, ``B``, under one draw."""
    with model.bind(value):
        predictions = model.predictions(**inputs)
    # A likelihood is a program, so the distribution of the labels is read from its
    # site. With the batch's size for N, a batch may be larger than the training set.
    with alone_in_pyro(), poutine.block(), poutine.trace() as run:
        model.likelihood(predictions, labels, len(labels))
    site: Any = run.trace.nodes.get("labels")
    if site is None:
        raise ValueError(
            f"{type(model.likelihood).__name__} observes no site 'labels'; name it so: "
            f"pyro.sample('labels', ..., obs=labels)"
        )
    log_prob = log_prob_by_datum(site, len(labels))
    return site["fn"].sample().cpu(), log_prob.cpu()


def _dimension(model: RankModel, site: str, values: Tensor) -> str:
    """The dimension of a latent site: by the model's labels, its name, or its size."""
    level, size = site.removesuffix("_scale"), values.shape[-1]
    if labels := model.site_labels(site):
        return labels[0]
    # By name before size: with one rank per module, ``module_scale`` has R entries too.
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


def _coordinates(model: RankModel, sites: Iterable[str]) -> _Coords:
    """The coordinates along each dimension, its own labels first."""
    space = model.space
    places = {name: [*each] for name, each in space.coordinates.items()}
    coords: _Coords = {"gate_id": {"gate_id": _gate_labels(space), **places}}
    coords |= {f"{k}_id": {f"{k}_id": names} for k, names in _groups(space).items()}
    return coords | dict(filter(None, map(model.site_labels, sites)))


def _gate_labels(space: RankSpace) -> list[str]:
    """Labels as "l0.attention.self.query[3]", or by module names where these repeat."""
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


def _drawn(values: Tensor, *dimensions: str) -> tuple[tuple[str, ...], Any]:
    """``S x ...`` draws as a variable in one chain."""
    return (*_SAMPLE, *dimensions), _array(values)[None]


def _data_dims(labels: Tensor) -> tuple[str, ...]:
    """The dimensions of labels, ``n x ...``, under the names that ArviZ gives."""
    return _DATUM, *(f"labels_dim_{i}" for i in range(labels.dim() - 1))


def _dataset(variables: _Variables, coords: _Coords) -> Any:
    """An xarray Dataset that has coordinates along every dimension."""
    import xarray

    used: dict[str, Any] = {}
    for dims, values in variables.values():
        for dim, size in zip(dims, values.shape):
            named = {dim: range(size)} | coords.get(dim, {})
            used |= {name: (dim, [*each]) for name, each in named.items()}
    return xarray.Dataset(variables, used)


def _array(tensor: Tensor) -> Any:
    return precise(tensor.detach()).cpu().numpy()  # NumPy has no bfloat16

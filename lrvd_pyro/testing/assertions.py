"""Assertions that prove a prior, a guide or an objective right.

Statistical ones fail by chance with probability `FAILURE_RATE`; seed the tests.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import cycle, islice
from statistics import NormalDist
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI
from torch import Tensor, nn

from lrvd_pyro.inference.elbo import RankELBO
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.optim import AdamW, parameter_groups
from lrvd_pyro.predictive.predictive import predict
from lrvd_pyro.testing.goodness_of_fit import FAILURE_RATE

Batch = Mapping[str, Any]
Program = Callable[..., Any]
MakePair = Callable[[], tuple[RankModel, Program]]


def assert_ok(
    make_pair: MakePair,
    batches: Iterable[Batch],
    *,
    elbo: ELBO | None = None,
    driver: Literal["svi", "torch"] = "svi",
) -> None:
    """Assert that a model and its guide train, predict, and survive being saved.

    After one step per batch, every loss is finite; every trainable parameter of
    network, prior, likelihood and guide has moved; predictions are finite, class
    probabilities sum to one; and the state dicts, loaded into a fresh pair, give the
    same predictions. Pyro's store is left as it was.

    Give two batches or more: LoRA starts at B = 0, and A has no gradient before B has
    moved. A guide that is a function has no state dict; saving is then not tried.

    Example::

        assert_ok(lambda: pair(net(), prior=my_prior), [batch] * 3)

    Args:
        make_pair: Makes a model and its guide, on a new network at each call.
        batches: Dicts of tensors as the model takes them, with labels.
        elbo: None takes ``RankELBO()``; under SVI its own ValueError says that a loss
            is not finite.
        driver: "svi", or "torch" for a torch optimizer.
    """
    batches = list(batches)
    store = pyro.get_param_store()
    with store.scope():
        model, guide = make_pair()
        parameters = _trainable(model, guide, batches[0])
        before = _copies(parameters)
        _train(model, guide, batches, elbo or RankELBO(), driver)
        still = [n for n, p in parameters.items() if torch.equal(p, before[n])]
        assert not still, f"after {len(batches)} steps these have not moved: {still}"
        expected = _predictions(model, guide, batches)
    if isinstance(guide, nn.Module):
        with store.scope():
            fresh, fresh_guide = make_pair()
            assert fresh.base_net is not model.base_net, "make_pair shares one network"
            assert isinstance(fresh_guide, nn.Module)
            with torch.random.fork_rng():
                fresh_guide(**batches[0])  # AutoGuides make their parameters here
            fresh.load_state_dict(model.state_dict())
            fresh_guide.load_state_dict(guide.state_dict())
            for name, field in _predictions(fresh, fresh_guide, batches).items():
                same = torch.allclose(field, expected[name], rtol=1e-4, atol=1e-6)
                assert same, f"loaded into a fresh pair, it predicts another {name}"


def assert_error(
    make_pair: MakePair,
    batch: Batch,
    match: str,
    error: type[Exception] = ValueError,
) -> None:
    """Assert that a wrong pair is refused, and that the refusal changes nothing.

    Making the pair or its first SVI step raises ``error``, the regular expression
    ``match`` is found in the message, and no parameter has moved.

    Example::

        assert_error(lambda: (model, AutoDelta(model)), batch, "has no minimum")
    """
    parameters: dict[str, Tensor] = {}
    before: dict[str, Tensor] = {}
    with pyro.get_param_store().scope():
        try:
            model, guide = make_pair()
            parameters = _named_parameters(model, guide)
            before = _copies(parameters)
            SVI(model, guide, AdamW(), loss=RankELBO()).step(**batch)
        except error as refusal:
            found = re.search(match, str(refusal))
            assert found, f"{match!r} is not in the message: {refusal}"
        else:
            raise AssertionError(f"no {error.__name__} was raised")
    moved = [n for n, p in parameters.items() if not torch.equal(p, before[n])]
    assert not moved, f"refused, but these have moved: {moved}"


def assert_unbiased_elbo(
    model: Program,
    guide: Program,
    batches: Iterable[Batch],
    exact: float,
    *,
    elbo: ELBO | None = None,
    num_estimates: int = 1000,
    failure_rate: float = FAILURE_RATE,
) -> None:
    """Assert that the mean loss over batches is the exact one, within standard errors.

    ``exact`` is the negative ELBO of all data in nats; ``batches`` are random, or a
    partition of the data, and repeated as needed; ``elbo`` is ``RankELBO()`` if None.

    Wrong for batches of unequal size, whose mean is not the loss of all data, and for
    losses of infinite variance.

    Example::

        assert_unbiased_elbo(model, guide, random_batches(), exact=kl - fit)
    """
    objective: Any = elbo or RankELBO()
    taken = islice(cycle(batches), num_estimates)
    losses = torch.tensor([objective.loss(model, guide, **batch) for batch in taken])
    mean, error = float(losses.mean()), float(losses.std()) / math.sqrt(len(losses))
    bound = NormalDist().inv_cdf(1 - failure_rate / 2) * error + 1e-6 * abs(exact)
    assert abs(mean - exact) <= bound, (
        f"the mean of {len(losses)} losses is {mean:.6g} with standard error "
        f"{error:.2g}; expected {exact:.6g}"
    )


def _train(
    model: RankModel, guide: Any, batches: list[Batch], elbo: Any, driver: str
) -> None:
    if driver == "svi":
        svi: Any = SVI(model, guide, AdamW(), loss=elbo)
        step = svi.step
    else:
        loss = elbo(model, guide)
        groups = parameter_groups(model, guide)
        optim = torch.optim.AdamW(groups, weight_decay=0.0)

        def step(**batch: Any) -> float:
            optim.zero_grad()
            value = loss(**batch)
            value.backward()
            optim.step()
            return float(value.detach())

    for number, batch in enumerate(batches):
        value = step(**batch)
        assert math.isfinite(value), f"the loss of step {number} is {value}"


def _trainable(model: Program, guide: Program, batch: Batch) -> dict[str, Tensor]:
    """The trainable parameters by name, once the guide has made its own."""
    with torch.random.fork_rng(), poutine.trace(param_only=True) as seen:
        guide(**batch)
    found = _named_parameters(model, guide)
    if not isinstance(guide, nn.Module):
        for name, site in seen.trace.nodes.items():
            if site["type"] == "param":
                value: Any = site["value"]
                found[name] = value.unconstrained()
    return {name: p for name, p in found.items() if p.requires_grad}


def _named_parameters(model: Program, guide: Program) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": parameter
        for part, program in (("model", model), ("guide", guide))
        if isinstance(program, nn.Module)
        for name, parameter in program.named_parameters()
    }


def _copies(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in parameters.items()}


def _predictions(
    model: RankModel, guide: Program, batches: list[Batch]
) -> dict[str, Tensor]:
    """The fields of the prediction, once they are found finite."""
    prediction = vars(predict(model, guide, batches, num_samples=4))
    fields = {n: f for n, f in prediction.items() if isinstance(f, Tensor)}
    infinite = [name for name, field in fields.items() if not field.isfinite().all()]
    assert not infinite, f"predictions are not finite in {infinite}"
    if "probs" in fields:
        total = fields["probs"].sum(-1)
        assert torch.allclose(total, torch.ones_like(total)), "probs do not sum to one"
    return fields

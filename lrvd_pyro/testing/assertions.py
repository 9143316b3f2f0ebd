"""Assertions on a model with its guide: that it trains, is refused, or is unbiased.

A statistical assertion fails by chance with probability `FAILURE_RATE`: seed the tests.
"""

import math
import re
from collections.abc import Callable, Iterable
from itertools import cycle, islice
from statistics import NormalDist
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI
from torch import Tensor, nn

from lrvd_pyro.batches import Batch
from lrvd_pyro.inference.elbo import RankELBO
from lrvd_pyro.inference.programs import Guide, Program
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.optim import AdamW, parameter_groups
from lrvd_pyro.predictive.predictive import predict
from lrvd_pyro.testing.goodness_of_fit import FAILURE_RATE

__all__ = ["MakePair", "assert_error", "assert_ok", "assert_unbiased_elbo"]

MakePair = Callable[[], tuple[RankModel, Guide]]


def assert_ok(
    make_pair: MakePair,
    batches: Iterable[Batch],
    *,
    elbo: ELBO | None = None,
    driver: Literal["svi", "torch"] = "svi",
) -> None:
    """Assert that a model and its guide train, predict, and survive being saved.

    After one step per batch

    - every loss is finite;
    - every trainable parameter of network, prior, likelihood and guide has moved;
    - predictions are finite, and class probabilities sum to one;
    - the state dicts, loaded into a fresh pair, give the same predictions.

    Pyro's store is left as it was.

    Wrong with a single batch where LoRA starts at B = 0: A has no gradient before B has
    moved. A guide that is a function has no state dict, so saving is not tried.

    Example::

        assert_ok(lambda: pair(net(), prior=my_prior), [batch] * 3)

    Args:
        make_pair: A function that makes a model and its guide, on a new network at each
            call.
        batches: Dicts of tensors as the model takes them, with labels.
        elbo: The loss; None takes ``RankELBO()``.
        driver: "svi", or "torch" for a torch optimizer.

    Raises:
        AssertionError: With what is wrong.
        ValueError: From `RankELBO` under SVI, if a loss is not finite.
    """
    batches = list(batches)
    # Functions and AutoGuides find their parameters in the store by name. In a scope of
    # its own, the fresh pair does not find those of the trained one.
    store = pyro.get_param_store()
    with store.scope():
        model, guide = make_pair()
        parameters = _trainable(model, guide, batches[0])
        before = _copies(parameters)
        _train(model, guide, batches, RankELBO() if elbo is None else elbo, driver)
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

    The making of the pair or its first SVI step raises an error, and no parameter has
    moved.

    Example::

        assert_error(lambda: (model, AutoDelta(model)), batch, "has no minimum")

    Args:
        make_pair: A function that makes a model and its guide.
        batch: A dict of tensors as the model takes it, with labels.
        match: A regular expression that the message contains.
        error: The class of the error.

    Raises:
        AssertionError: With what is wrong.
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
            matched = re.search(match, str(refusal))
            assert matched, f"{match!r} is not in the message: {refusal}"
        else:
            raise AssertionError(f"no {error.__name__} was raised")
    moved = [n for n, p in parameters.items() if not torch.equal(p, before[n])]
    assert not moved, f"refused, but these have moved: {moved}"


def assert_unbiased_elbo(
    model: Program,
    guide: Guide,
    batches: Iterable[Batch],
    exact: float,
    *,
    elbo: ELBO | None = None,
    num_estimates: int = 1000,
    failure_rate: float = FAILURE_RATE,
) -> None:
    """Assert that the mean loss over batches is the exact one, within standard errors.

    Wrong for batches of unequal size, whose mean is not the loss of all data, and for
    losses of infinite variance.

    Example::

        assert_unbiased_elbo(model, guide, random_batches(), exact=kl - fit)

    Args:
        model: The model.
        guide: Its guide.
        batches: Random batches, or a partition of the data; repeated as needed.
        exact: The negative ELBO of all data, in nats.
        elbo: The loss; None takes ``RankELBO()``.
        num_estimates: The number of losses in the mean.
        failure_rate: The probability of failing by chance.

    Raises:
        AssertionError: With the mean, its standard error and the exact value.
    """
    objective: Any = RankELBO() if elbo is None else elbo
    taken = islice(cycle(batches), num_estimates)
    losses = torch.tensor([objective.loss(model, guide, **batch) for batch in taken])
    mean, error = float(losses.mean()), float(losses.std()) / math.sqrt(len(losses))
    # A loss without variance still rounds.
    bound = NormalDist().inv_cdf(1 - failure_rate / 2) * error + 1e-6 * abs(exact)
    assert abs(mean - exact) <= bound, (
        f"the mean of {len(losses)} losses is {mean:.6g} with standard error "
        f"{error:.2g}; expected {exact:.6g}"
    )


def _train(
    model: RankModel, guide: Guide, batches: list[Batch], elbo: ELBO, driver: str
) -> None:
    """Take one step per batch under a driver."""
    step: Callable[..., float]
    if driver == "svi":
        svi: Any = SVI(model, guide, AdamW(), loss=elbo)
        step = svi.step
    else:
        module: Any = guide  # parameter_groups refuses a function, with a message
        loss = elbo(model, module)
        groups = parameter_groups(model, module)
        optim = torch.optim.AdamW(groups, weight_decay=0.0)

        def step(**batch: object) -> float:
            optim.zero_grad()
            value = loss(**batch)
            value.backward()
            optim.step()
            return float(value.detach())

    for number, batch in enumerate(batches):
        value = step(**batch)
        assert math.isfinite(value), f"the loss of step {number} is {value}"


def _trainable(model: Program, guide: Guide, batch: Batch) -> dict[str, Tensor]:
    """The trainable parameters by name, after the guide has made its own."""
    # Outside of the run's random numbers: the first call of an AutoGuide draws.
    with torch.random.fork_rng(), poutine.trace(param_only=True) as seen:
        guide(**batch)
    parameters = _named_parameters(model, guide)
    # The parameters of a function are in the store alone.
    if not isinstance(guide, nn.Module):
        for name, site in seen.trace.nodes.items():
            if site["type"] == "param":
                value: Any = site["value"]
                parameters[name] = value.unconstrained()
    return {name: p for name, p in parameters.items() if p.requires_grad}


def _named_parameters(model: Program, guide: Guide) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": parameter
        for part, program in (("model", model), ("guide", guide))
        if isinstance(program, nn.Module)
        for name, parameter in program.named_parameters()
    }


def _copies(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in parameters.items()}


def _predictions(
    model: RankModel, guide: Guide, batches: list[Batch]
) -> dict[str, Tensor]:
    """The fields of the prediction, asserted to be finite."""
    prediction = vars(predict(model, guide, batches, num_samples=4))
    fields = {n: f for n, f in prediction.items() if isinstance(f, Tensor)}
    infinite = [name for name, field in fields.items() if not field.isfinite().all()]
    assert not infinite, f"predictions are not finite in {infinite}"
    if "probs" in fields:
        total = fields["probs"].sum(-1)
        assert torch.allclose(total, torch.ones_like(total)), "probs do not sum to one"
    return fields

"""What models check about their arguments and their network."""

from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import Distribution

from lrvd_pyro._compat.pyro import mcmc_is_running
from lrvd_pyro.batches import Batch, batch_size
from lrvd_pyro.inference.dropout import active_dropout
from lrvd_pyro.inference.per_example import drawn_per_example

__all__ = [
    "check_call",
    "check_gates",
    "check_mcmc",
    "check_num_data",
    "check_rows_drawn",
    "checked_start",
    "logits_of",
]


def check_num_data(num_data: int | None) -> int:
    """The number of training examples, checked.

    Raises:
        TypeError: If it is not a positive integer.
    """
    # True is an Integral; num_data=True would be a data set of one.
    whole = isinstance(num_data, Integral) and not isinstance(num_data, bool)
    if not whole or int(num_data or 0) < 1:
        raise TypeError(
            f"num_data={num_data!r}; expected the number of training examples, "
            f"which weighs the likelihood against the prior: num_data=len(train)"
        )
    return int(num_data or 0)


def check_gates(model: object, needed_by: str, way_out: str) -> None:
    """Raise a TypeError unless a model draws gates, one number per rank component.

    Args:
        model: Any object; a `RankModel` has the word ``binds``.
        needed_by: What cannot do without.
        way_out: How to go on.
    """
    binds = getattr(model, "binds", "nothing")
    if binds != "gates":
        raise TypeError(
            f"{needed_by} needs gates, and {type(model).__name__} draws {binds}; "
            f"{way_out}"
        )


def check_call(args: tuple[object, ...], labels: object) -> None:
    """Raise a TypeError unless a batch came as keywords, its labels as a tensor."""
    if args:
        raise TypeError(
            f"got a {type(args[0]).__name__}; expected the batch as keywords, of a "
            f"mapping: model(**batch), svi.step(**batch)"
        )
    if labels is not None and not isinstance(labels, Tensor):
        raise TypeError(
            f"labels are a {type(labels).__name__}; expected a tensor with one "
            f"entry per example: torch.as_tensor(labels)"
        )


def check_mcmc(net: nn.Module, batch: Batch, num_data: int) -> None:
    """Raise where Pyro's MCMC runs, and would sample another posterior in silence.

    Args:
        net: The network that the model runs.
        batch: Its batch, with or without labels.
        num_data: The number of training examples N.

    Raises:
        TypeError: If the batch holds no tensor.
        ValueError: If the batch is not the whole data set, or dropout is on.
    """
    size = batch_size(batch)
    if not mcmc_is_running():
        return
    size = 0 if batch["labels"] is None else size
    if size != num_data:
        raise ValueError(
            f"MCMC runs the model on {size} labels out of num_data={num_data}, which "
            f"would sample another posterior (of none, the prior); pass all data: "
            f"MCMC(NUTS(model), ...).run(**whole), num_data=len(whole['labels'])"
        )
    if active_dropout(net):
        raise ValueError(
            "MCMC runs a network whose dropout is on, so that its density is random; "
            "call net.eval() first"
        )


def check_rows_drawn(value: Tensor, mixed: str) -> None:
    """Raise a ValueError unless the rows of a draw are those of examples.

    Args:
        value: What was drawn, ``B x ...``.
        mixed: Why the network takes no draw per example; empty if it takes one.
    """
    # Rows of several draws would be taken for rows of examples.
    if not drawn_per_example():
        raise ValueError(
            f"the adapter was drawn with shape {tuple(value.shape)}, several draws at "
            f"once; use Predictive(parallel=False) or lrvd_pyro.predict"
        )
    if mixed:
        raise ValueError(f'{mixed}; draw per batch: RankELBO(noise="batch")')


def logits_of(output: object) -> Tensor:
    """The logits of a network's output, or the output itself if it is a tensor.

    Raises:
        TypeError: If the output is neither a tensor nor something with logits.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the network returned a {type(output).__name__}; expected a tensor or "
            f"an output with logits: net(**batch, return_dict=True), or a head"
        )
    return logits


def checked_start(
    draw: Callable[[], object],
    sites: Mapping[str, Distribution],
    numbers: Mapping[str, float],
    device: torch.device,
) -> dict[str, Tensor]:
    """Where guides start each latent site, checked to lie within its support.

    At the edge of a support the unconstrained value is infinite, which torch clamps in
    silence: a guide would stay where it is. A support may depend on other sites, which
    are at their own starts here.

    Args:
        draw: The Pyro statements.
        sites: The latent sites.
        numbers: The value of all components of a site; 1 where there is none.
        device: Where the starts are made.

    Raises:
        ValueError: With the site and the attribute that moves the start.
    """
    start = {
        name: torch.full(law.event_shape, numbers.get(name, 1.0), device=device)
        for name, law in sites.items()
    }
    with poutine.block(), poutine.trace() as run:
        with poutine.condition(data=start):
            draw()
    nodes: dict[str, Any] = run.trace.nodes
    for site, value in start.items():
        law = nodes[site]["fn"]
        # The meta device has no numbers to compare.
        if value.is_meta or law.support.is_discrete or _is_inside(value, law.support):
            continue
        raise ValueError(
            f"guides start the latent site {site!r} at {numbers.get(site, 1.0)}, which "
            f"is not inside the support of its "
            f"{type(getattr(law, 'base_dist', law)).__name__}; give the prior a start "
            f"there: prior.start = {{{site!r}: ...}}"
        )
    return start


def _is_inside(value: Tensor, support: Any) -> bool:
    around = [value]
    if getattr(support, "base_constraint", support).event_dim == 0:
        step = 1e-6 * value.abs().clamp(min=1.0)
        around += [value - step, value + step]
    return all(bool(support.check(each).all()) for each in around)

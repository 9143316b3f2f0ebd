"""Which parameters train together, and at which learning rate."""

from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn

from lrvd_pyro._numbers import check_rate
from lrvd_pyro.inference.pairs import paired
from lrvd_pyro.inference.param_store import check_has_parameters

__all__ = ["GROUPS", "Optimizer", "group_of", "parameter_groups", "rates_of"]

Optimizer = torch.optim.Optimizer | PyroOptim

GROUPS = ("adapter", "head", "variational")


def group_of(path: str, *, in_net: bool) -> str:
    """The group of a parameter.

    LoRA weights are the ``adapter``. Whatever else trains in the network is the
    ``head``. Parameters of guide, prior and likelihood are ``variational``.
    """
    if not in_net:
        return "variational"
    return "adapter" if "lora_" in path else "head"


def rates_of(
    lr: float, head_lr: float | None, variational_lr: float
) -> tuple[float, float, float]:
    """The learning rates of the groups, checked; a rate of 0 holds a group still."""
    given = {"lr": lr, "head_lr": head_lr, "variational_lr": variational_lr}
    for name, rate in given.items():
        if rate is not None:
            check_rate(name, rate, f"{name}=1e-3")
    return lr, lr if head_lr is None else head_lr, variational_lr


def parameter_groups(
    model: nn.Module,
    guide: nn.Module,
    *,
    lr: float = 1e-3,
    head_lr: float | None = None,
    variational_lr: float = 5e-2,
) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer, with the learning rates of `AdamW`.

    Example::

        loss = RankELBO()(model, guide)
        optim = torch.optim.AdamW(parameter_groups(model, guide), weight_decay=0.0)
        loss(**batch).backward()
        optim.step()
        optim.zero_grad()

    To accumulate gradients over k micro-batches, call
    ``(loss(**batch) / k).backward()`` for each before the one ``optim.step()``.
    `RankELBO.check` before that step finds a loss or a gradient that is not finite. In
    float16, ``(loss(**batch) / num_data).backward()`` keeps gradients within 65,504.

    Args:
        model: The model; its network is ``model.net``.
        guide: The guide.
        lr: Learning rate of the adapter.
        head_lr: Learning rate of the head; None takes ``lr``.
        variational_lr: Learning rate of guide, prior and likelihood.

    Returns:
        The groups adapter, head and variational: ``params``, ``lr`` and ``name`` each.

    Raises:
        TypeError: If ``guide`` is a function; its parameters are known to SVI alone.
        ValueError: If ``guide`` was built on another model, or is an AutoGuide that has
            no parameters yet, or a learning rate is negative or not finite.
    """
    rates = rates_of(lr, head_lr, variational_lr)
    paired(model, guide)
    instead = "use it with pyro.infer.SVI and lrvd_pyro.optim.AdamW"
    check_has_parameters(guide, "parameter_groups(model, guide)", instead)
    groups: dict[str, list[Tensor]] = {group: [] for group in GROUPS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            path = name.removeprefix("net.")
            groups[group_of(path, in_net=path != name)].append(parameter)
    groups["variational"] += [p for p in guide.parameters() if p.requires_grad]
    return [
        {"params": groups[name], "lr": rate, "name": name}
        for name, rate in zip(GROUPS, rates, strict=True)
    ]

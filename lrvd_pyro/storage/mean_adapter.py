"""What each LoRA module is at the posterior mean, in tensors that PEFT has too."""

from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from lrvd_pyro.inference.programs import Guide
from lrvd_pyro.models.base import Factors, RankModel
from lrvd_pyro.predictive.predictive import mean_value
from lrvd_pyro.rank_space.constant import constant


class MeanModule(NamedTuple):
    """A LoRA module at the posterior mean, its scaling in B and bias."""

    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None


def mean_modules(
    model: RankModel, guide: Guide, *, drop: bool
) -> dict[str, MeanModule]:
    """For each LoRA module A, scaling B diag(z) and its bias at the posterior mean.

    A DoRA module keeps one component, since its magnitude is no part of a rank.
    """
    space = model.space
    space.require_live()
    with torch.no_grad():
        factors = model.factors(mean_value(model, guide))
        _check_factors(model, factors)
        means, dora = {}, space.dora
        for name, layer in zip(space.modules, space.layers):
            A, B, gate = factors[name]
            scaling = layer.scaling[space.adapter]
            bias = _mean_bias(layer, space.adapter, gate)
            if B.shape[1] != len(gate):  # a grouped convolution: rows of A are ranks
                means[name] = MeanModule(_scaled(A, gate, 0), (B * scaling).to(B), bias)
                continue
            keep = gate != 0 if drop else torch.ones_like(gate, dtype=torch.bool)
            if name in dora and not keep.any():
                keep[0] = True
            scaled = _scaled(B, gate * scaling, 1)
            means[name] = MeanModule(A[keep], scaled[:, keep], bias)
        for name, layer in space.constants.items():
            sides: Any = layer.lora_A[space.adapter], layer.lora_B[space.adapter]
            A, B = (side.weight for side in sides)
            bias = _mean_bias(layer, space.adapter, A.new_ones(1))
            rows = 0 if drop else 1
            means[name] = MeanModule(A[:rows], B[:, :rows], bias)
    return means


def _check_factors(model: RankModel, factors: dict[str, Factors]) -> None:
    """Raise unless a model's factors are those of its modules, at their shapes."""
    space = model.space
    sides = space.weights("lora_A"), space.weights("lora_B")
    expected = {
        name: (A.shape, B.shape, (rank,))
        for name, rank, A, B in zip(space.modules, space.ranks, *sides)
    }
    found = {name: tuple(t.shape for t in each) for name, each in factors.items()}
    if found != expected:
        name = next(n for n in expected | found if found.get(n) != expected.get(n))
        raise TypeError(
            f"{type(model).__name__}.factors gives {name!r} as lora_A, lora_B and gate "
            f"of the shapes {found.get(name)}; expected {expected.get(name)}, for "
            f"each of model.space.modules"
        )


def is_nothing(mean: MeanModule) -> bool:
    """Whether a module adds 0 to any input."""
    return len(mean.lora_A) == 0 and (mean.bias is None or not mean.bias.any())


def _mean_bias(layer: LoraLayer, adapter: str, gate: Tensor) -> Tensor | None:
    """``scaling (bias + B diag(1 - z) c)``: what a layer adds to any input."""
    lora_B: Any = layer.lora_B[adapter]
    if lora_B.bias is None:
        return None
    bias: Tensor = lora_B.bias
    if hasattr(lora_B, "center"):
        bias = bias + constant(lora_B, 1 - gate)
    scaled: Tensor = bias * layer.scaling[adapter]
    return scaled


def _scaled(weight: Tensor, factors: Tensor, dim: int) -> Tensor:
    """``weight`` times one factor per index of ``dim``, in the wider precision."""
    shape = [-1 if d == dim else 1 for d in range(weight.dim())]
    return (weight * factors.to(weight.device).view(shape)).to(weight.dtype)


def padded(name: str, mean: MeanModule, rank: int) -> MeanModule:
    """The same with zeros up to a rank.

    Raises:
        TypeError: If the module is a grouped convolution.
    """
    A, B, bias = mean
    if len(A) == rank:
        return mean
    if B.shape[1] != len(A):
        raise TypeError(
            f"{name!r} is a grouped convolution, whose ranks are tied to its groups, "
            f'so that zeros cannot fill it up to rank {rank}; use mode="pruned"'
        )
    missing = rank - len(A)
    rows = A.new_zeros(missing, *A.shape[1:])
    columns = B.new_zeros(len(B), missing, *B.shape[2:])
    return MeanModule(torch.cat([A, rows]), torch.cat([B, columns], 1), bias)

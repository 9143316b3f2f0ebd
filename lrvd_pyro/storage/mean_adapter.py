"""The LoRA modules of an adapter at the posterior mean, in PEFT's own tensors."""

from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from lrvd_pyro.inference.programs import Guide
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.models.factors import Factors
from lrvd_pyro.predictive.predictive import mean_value
from lrvd_pyro.rank_space.constant import constant

__all__ = ["MeanModule", "is_nothing", "mean_modules", "padded"]


class MeanModule(NamedTuple):
    """A LoRA module at the posterior mean, with a scaling of 1.

    Gate means and the scaling are multiplied into ``lora_B`` (in a grouped convolution,
    gate means into ``lora_A``), the scaling also into ``bias``.

    Attributes:
        lora_A: ``r x in_features``, or as the layer has it.
        lora_B: ``out_features x r``, or as the layer has it.
        bias: ``out_features``; None without a bias.
    """

    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None


def mean_modules(
    model: RankModel, guide: Guide, *, drop: bool
) -> dict[str, MeanModule]:
    """Give A, ``scaling B diag(z)`` and bias of each LoRA module at the posterior mean.

    Args:
        model: The trained model.
        guide: Its guide.
        drop: Leave out components whose mean gate is 0. A DoRA module keeps one, since
            its magnitude belongs to no rank. A grouped convolution keeps all, since its
            ranks are tied to its groups.

    Raises:
        TypeError: If the model's ``factors`` do not fit its modules.
        RuntimeError: If the adapter is merged, disabled, inactive or deleted.
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
            # In a grouped convolution B has r / groups columns: only A has a row for
            # each rank, so the gate goes there.
            if B.shape[1] != len(gate):
                means[name] = MeanModule(_scaled(A, gate, 0), (B * scaling).to(B), bias)
                continue
            keep = gate != 0 if drop else torch.ones_like(gate, dtype=torch.bool)
            if name in dora and not keep.any():
                keep[0] = True  # PEFT has no rank 0, and the magnitude has to stay
            scaled = _scaled(B, gate * scaling, 1)
            means[name] = MeanModule(A[keep], scaled[:, keep], bias)
        for name, layer in space.constants.items():
            sides: Any = layer.lora_A[space.adapter], layer.lora_B[space.adapter]
            A, B = (side.weight for side in sides)  # placeholders: zeros of rank 1
            bias = _mean_bias(layer, space.adapter, A.new_ones(1))
            rows = 0 if drop else 1
            means[name] = MeanModule(A[:rows], B[:, :rows], bias)
    return means


def is_nothing(mean: MeanModule) -> bool:
    """Whether a module adds 0 to any input."""
    return len(mean.lora_A) == 0 and (mean.bias is None or not mean.bias.any())


def padded(name: str, mean: MeanModule, rank: int) -> MeanModule:
    """Fill a module up with zeros to a rank.

    Raises:
        TypeError: If the module is a grouped convolution.
    """
    A, B, bias = mean
    if len(A) == rank:
        return mean
    if B.shape[1] != len(A):
        raise TypeError(
            f"{name!r} is a grouped convolution, whose ranks are tied to its groups, "
            f'so zeros cannot fill it up to rank {rank}; use mode="pruned"'
        )
    missing = rank - len(A)
    rows = A.new_zeros(missing, *A.shape[1:])
    columns = B.new_zeros(len(B), missing, *B.shape[2:])
    return MeanModule(torch.cat([A, rows]), torch.cat([B, columns], 1), bias)


def _check_factors(model: RankModel, factors: dict[str, Factors]) -> None:
    """Raise unless a model's factors are those of its modules, at their shapes."""
    space = model.space
    sides = space.weights("lora_A"), space.weights("lora_B")
    expected = {
        name: (A.shape, B.shape, (rank,))
        for name, rank, A, B in zip(space.modules, space.ranks, *sides)
    }
    shapes = {name: tuple(t.shape for t in each) for name, each in factors.items()}
    if shapes != expected:
        name = next(n for n in expected | shapes if shapes.get(n) != expected.get(n))
        raise TypeError(
            f"{type(model).__name__}.factors gives {name!r} as lora_A, lora_B and gate "
            f"of the shapes {shapes.get(name)}; expected {expected.get(name)}, for "
            f"each of model.space.modules"
        )


def _mean_bias(layer: LoraLayer, adapter: str, gate: Tensor) -> Tensor | None:
    """``scaling (bias + B diag(1 - z) c)``: what a layer adds to any input."""
    lora_B: Any = layer.lora_B[adapter]
    if lora_B.bias is None:
        return None
    bias: Tensor = lora_B.bias
    if hasattr(lora_B, "center"):
        # Gates z about a center c give c + z (h - c) = z h + (1 - z) c.
        bias = bias + constant(lora_B, 1 - gate)
    scaled: Tensor = bias * layer.scaling[adapter]
    return scaled


def _scaled(weight: Tensor, factors: Tensor, dim: int) -> Tensor:
    """``weight`` times one factor per index of ``dim``, rounded once at the end."""
    shape = [-1 if d == dim else 1 for d in range(weight.dim())]
    return (weight * factors.to(weight.device).view(shape)).to(weight.dtype)

"""What models check about their arguments and their network."""

import warnings
from numbers import Integral

import torch

from lrvd_pyro._compat.pyro import mcmc_is_running
from lrvd_pyro.rank_space.space import RankSpace

__all__ = ["FrozenAdapter", "check_labels", "check_num_data"]


def check_labels(labels: object) -> None:
    """Raise a TypeError unless labels are a tensor, or None."""
    if labels is not None and not isinstance(labels, torch.Tensor):
        raise TypeError(
            f"labels are a {type(labels).__name__}; expected a tensor with one "
            f"entry per example: torch.as_tensor(labels)"
        )


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


class FrozenAdapter:
    """Warns once, at the first training step, of an adapter that was loaded frozen.

    PEFT loads adapters frozen by default, and marks their configuration so. Weights
    that the user froze have no such mark.
    """

    def __init__(self) -> None:
        self._checked = False

    def check(self, space: RankSpace) -> None:
        """Warn if this pass trains and the adapter does not."""
        # MCMC draws gates over an adapter that stays as it is.
        if self._checked or not torch.is_grad_enabled() or mcmc_is_running():
            return
        self._checked = True
        weights = [*space.weights("lora_A"), *space.weights("lora_B")]
        loaded = space.net.peft_config[space.adapter].inference_mode
        if loaded and weights and not any(weight.requires_grad for weight in weights):
            warnings.warn(
                f"all weights of adapter {space.adapter!r} are frozen, as PEFT loads "
                f"them, and training leaves them as they are; to train them, "
                f"PeftModel.from_pretrained(base, folder, is_trainable=True); to train "
                f"the guide alone, load them so and call net.requires_grad_(False)",
                stacklevel=2,
            )

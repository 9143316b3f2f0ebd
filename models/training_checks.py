"""What is warned of at the first training step."""

import warnings
from collections.abc import Mapping

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from lrvd_pyro._compat.pyro import mcmc_is_running
from lrvd_pyro._compat.transformers import is_from_checkpoint
from lrvd_pyro.inference.dropout import active_dropout
from lrvd_pyro.rank_space.find import plain_net
from lrvd_pyro.rank_space.space import RankSpace

__all__ = ["TrainingChecks", "moves_base"]

# Values of init_lora_weights that subtract the first B A from the base weights.
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def moves_base(start: object) -> bool:
    """Whether this value of ``init_lora_weights`` changes the weights of the base."""
    return isinstance(start, str) and start.lower().startswith(_MOVES_BASE)


class TrainingChecks:
    """Warns once each, at the first training step, of what makes training go wrong."""

    def __init__(self) -> None:
        self._began = self._saw_training_mode = False

    def check(self, space: RankSpace) -> None:
        """Warn if this pass trains, and is the first to do so."""
        # MCMC draws gates over a network that stays as it is.
        if not torch.is_grad_enabled() or mcmc_is_running():
            return
        if not self._began:
            self._began = True
            _warn_of_a_frozen_adapter(space)
            outside = _outside_adapters(space)
            _warn_of_random_parts(outside)
            _warn_of_a_trained_base(space, outside)
            _warn_of_a_moved_base(space)
        # The mode of the network may change after the first step.
        net = plain_net(space.net)
        if net.training and not self._saw_training_mode:
            self._saw_training_mode = True
            _warn_of_dropout(active_dropout(net))


def _warn_of_a_frozen_adapter(space: RankSpace) -> None:
    """PEFT loads adapters frozen by default, and marks their configuration so.

    Weights that the user froze have no such mark.
    """
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


def _warn_of_random_parts(own: Mapping[str, nn.Parameter]) -> None:
    """Parts that no checkpoint held, as a new head, and that PEFT has frozen."""
    known = {name for name, parameter in own.items() if is_from_checkpoint(parameter)}
    # Without a checkpoint all parts are random, and the user knows.
    random = [n for n in own if n not in known and not own[n].requires_grad]
    if known and random:
        part = random[0].split(".")[0]
        warnings.warn(
            f"the checkpoint had no {', '.join(random[:4])}: {len(random)} parameters "
            f"are random and frozen, and training leaves them so; "
            f'LoraConfig(task_type="SEQ_CLS"), or "TOKEN_CLS", trains '
            f"a new head, and LoraConfig(modules_to_save=[{part!r}]) any part",
            stacklevel=2,
        )


def _outside_adapters(space: RankSpace) -> dict[str, nn.Parameter]:
    """The parameters that are neither an adapter's nor in a layer that has one."""
    net = plain_net(space.net)
    own = dict(net.named_parameters())
    for name, module in net.named_modules():
        # An adapter has parameters of its own, and keeps the head that it replaces.
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            own = {n: p for n, p in own.items() if not n.startswith(f"{name}.")}
    return own


def _warn_of_a_trained_base(space: RankSpace, own: Mapping[str, nn.Parameter]) -> None:
    """Parts of the base that train, and that no file of an adapter holds."""
    biases = space.net.peft_config[space.adapter].bias != "none"  # which PEFT saves
    trained = [
        name
        for name, parameter in own.items()
        if parameter.requires_grad and not (biases and "bias" in name)
    ]
    if trained:
        part = trained[0].rpartition(".")[0]
        warnings.warn(
            f"{', '.join(trained[:4])} ({len(trained)} parameters) of the base train, "
            f"and no adapter file holds them: save and export_peft will refuse the "
            f"network; name their modules, LoraConfig(modules_to_save=[{part!r}]), or "
            f"freeze them: requires_grad_(False)",
            stacklevel=2,
        )


def _warn_of_a_moved_base(space: RankSpace) -> None:
    """Ways to start an adapter that take it out of the base, whose weights move."""
    start = space.net.peft_config[space.adapter].init_lora_weights
    if moves_base(start):
        warnings.warn(
            f"init_lora_weights={start!r} changed the base, so that adapter files for "
            f"the base as it was do not hold the network: save will refuse it, and "
            f'export_peft(mode="merged") gives its mean; to keep the posterior, take '
            f"LoraConfig(init_lora_weights=True)",
            stacklevel=2,
        )


def _warn_of_dropout(rates: dict[str, float]) -> None:
    # Of lora_dropout one was told when the model was made.
    base = {name: rate for name, rate in rates.items() if "lora_dropout" not in name}
    if base:
        name, rate = next(iter(base.items()))
        warnings.warn(
            f"the network trains with dropout: {rate} in {name!r}, {len(base)} such "
            f"modules in all. It is noise beside the posterior's, which neither the KL "
            f"nor a prediction has; call net.eval(), under which all still trains, or "
            f"load the network with dropout rates of 0",
            stacklevel=2,
        )

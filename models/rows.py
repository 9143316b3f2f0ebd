"""Whether a model's network takes a draw for each example of a batch."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lrvd_pyro._compat.torch import tree_leaves, tree_map
from lrvd_pyro.models.inputs import by_row, with_rows
from lrvd_pyro.rank_space.row_check import mixed_rows
from lrvd_pyro.rank_space.space import RankSpace

__all__ = ["RowCheck"]

_PASSES = 32  # at a layerdrop of .5, one of 1e9 layers is dropped in all of them


@dataclass
class _Verdict:
    """What the batches of one setting have shown."""

    unseen: set[str]
    reason: str = ""
    passes: int = 0


class RowCheck:
    """Remembers where one example's draw would reach another's predictions.

    The first batch of two or more examples decides, in each setting: the LoRA modules
    that there are, the mode of each module, and the inputs' names, dimensions and
    options. A batch costs two more forward passes, and backward passes as `mixed_rows`
    says. Where it does not run all modules (layerdrop, rare experts), up to 31 more
    batches are looked at.

    Another pass has the last example in front, so that a network that sorts its batch
    by length shows it even if the batch is sorted. Wrong for a sorted batch of which
    some entry has no row per example, or which the network takes in this order alone:
    nothing is seen then.
    """

    def __init__(self) -> None:
        self._verdicts: dict[tuple[Any, ...], _Verdict] = {}

    def reason(
        self,
        space: RankSpace,
        predictions: Callable[..., Tensor],
        inputs: Mapping[str, Any],
        examples: int,
    ) -> str:
        """Why this network takes no draw per example; empty if it takes one.

        Args:
            space: The rank components.
            predictions: From inputs to predictions, ``B x ...``.
            inputs: The network's keyword arguments.
            examples: The number of examples, B.

        Raises:
            RuntimeError: If the adapter is merged, disabled, inactive or deleted, or
                activation checkpointing is reentrant.
        """
        if space.dora:
            name = space.dora[0]
            return f"the DoRA layer {name!r} takes one draw for the whole batch"
        # The meta device has no gradients to look at.
        if examples == 1 or space.device.type == "meta":
            return ""
        setting = space.modules, _modes(space.net), _kinds(inputs)
        known = self._verdicts.setdefault(setting, _Verdict(set(space.modules)))
        if known.unseen and not known.reason and known.passes < _PASSES:
            with space.binding.holding({}):  # refuses what no draw can enter
                usable = tree_map(_usable, dict(inputs))
                known.reason, seen = mixed_rows(
                    space, lambda: predictions(**usable), examples
                )
                if not known.reason and _has_rows_alone(usable, examples):
                    with suppress(Exception):  # the network may demand an order
                        rolled = with_rows(usable, examples, lambda t: t.roll(1, 0))
                        known.reason, _ = mixed_rows(
                            space,
                            lambda: predictions(**rolled),
                            examples,
                            neighbors=True,
                        )
            known.unseen -= seen
            known.passes += 1
        return known.reason


def _modes(net: nn.Module) -> bytes:
    """The mode of each module, in order: a part may be thawed later."""
    return bytes(module.training for module in net.modules())


def _kinds(inputs: Mapping[str, Any]) -> frozenset[tuple[str, object]]:
    """What a layout may depend on: dimensions of tensors, values of options."""
    return frozenset((name, _kind(value)) for name, value in inputs.items())


def _kind(value: object) -> object:
    if isinstance(value, Tensor):
        return value.dim()
    return value if _is_option(value) else type(value)


def _is_option(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _has_rows_alone(inputs: Mapping[str, Any], examples: int) -> bool:
    """Whether all inputs but options are tensors with a row for each example."""
    entries = [value for value in inputs.values() if not _is_option(value)]
    return all(by_row(leaf, examples) for leaf in tree_leaves(entries))


def _usable(leaf: object) -> object:
    """An input that autograd can keep: tensors of the inference mode are copied."""
    if isinstance(leaf, Tensor) and leaf.is_inference():
        return leaf.clone()
    return leaf

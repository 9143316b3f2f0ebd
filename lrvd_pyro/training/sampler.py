"""A shuffled order of training examples, to be left and resumed at any index."""

from collections.abc import Iterator, Mapping
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

__all__ = ["ResumableSampler"]


class ResumableSampler(Sampler[int]):
    """Every index below ``n`` once per epoch, in an order that (seed, epoch) fixes.

    Iteration yields the rest of the present epoch, so a fresh sampler with this one's
    `state_dict` goes on at the next index. No global random number generator is used.

    Example::

        sampler = ResumableSampler(len(train), seed=0)
        while sampler.epoch < 3:
            for index in sampler.batches(32):             # (32,), fewer at the end
                svi.step(**{k: v[index] for k, v in train.items()})

    A DataLoader must have a generator of its own. Without one, each ``iter(loader)``
    draws once from the global generator, and a resume adds such a draw::

        DataLoader(train, 32, sampler=sampler, generator=torch.Generator())

    Wrong with ``num_workers`` above 0: the loader then fetches batches ahead of
    training. Before a checkpoint, call ``sampler.seek(epoch, examples)`` with the
    examples trained on. Examples that workers augment at random are not reproduced.

    Args:
        n: The number of examples.
        seed: The seed of all epochs together, 0 or more.

    Attributes:
        epoch: Epochs completed.
        position: Examples yielded of the present epoch, below ``n``.

    Raises:
        ValueError: If ``n`` is not a whole number above 0, or ``seed`` not one of 0 or
            more.
    """

    def __init__(self, n: int, seed: int = 0) -> None:
        whole = isinstance(n, Integral) and isinstance(seed, Integral)
        if not whole or n < 1 or seed < 0:
            raise ValueError(
                f"n={n!r}, seed={seed!r}; expected the number of examples and a seed, "
                f"0 or more: ResumableSampler(len(train), seed=0)"
            )
        self.n, self.seed = int(n), int(seed)
        self.epoch = self.position = 0

    def __len__(self) -> int:
        """The number of examples of a whole epoch."""
        return self.n

    def __iter__(self) -> Iterator[int]:
        for index in self.batches(1):
            yield int(index)

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield the indices left of this epoch, ``size`` at a time, fewer at the end.

        Args:
            size: The number of examples B in a batch.

        Returns:
            An iterator over indices, ``B`` each.

        Raises:
            ValueError: If ``size`` is below 1.
        """
        if size < 1:
            raise ValueError(f"size={size}; expected 1 or more: sampler.batches(32)")
        return self._batches(size)

    def seek(self, epoch: int, position: int) -> None:
        """Go on after the first ``position`` examples of an epoch.

        Args:
            epoch: The number of the epoch, from 0.
            position: How many of its examples to pass over, at most ``n``.

        Raises:
            ValueError: If there is no such place.
        """
        if epoch < 0 or not 0 <= position <= self.n:
            raise ValueError(
                f"epoch={epoch}, position={position}; expected 0 or more, and a "
                f"position of at most n={self.n}"
            )
        done = position == self.n
        self.epoch, self.position = (epoch + 1, 0) if done else (epoch, position)

    def state_dict(self) -> dict[str, int]:
        """The four numbers n, seed, epoch and position."""
        return {
            "n": self.n,
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
        }

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise unless `load_state_dict` takes this state.

        Raises:
            ValueError: If it belongs to other data or another seed.
        """
        if (state["n"], state["seed"]) != (self.n, self.seed):
            raise ValueError(
                f"the saved sampler has n={state['n']}, seed={state['seed']} and this "
                f"one n={self.n}, seed={self.seed}, so their orders differ; use "
                f"ResumableSampler({state['n']}, seed={state['seed']}) on the same data"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; call it before iterating.

        Raises:
            ValueError: If it belongs to other data or another seed.
        """
        self.check(state)
        self.seek(int(state["epoch"]), int(state["position"]))

    def _batches(self, size: int) -> Iterator[Tensor]:
        epoch = self.epoch
        # NumPy promises that RandomState's stream never changes, unlike default_rng's.
        bits = np.random.MT19937(np.random.SeedSequence((self.seed, epoch)))
        order = torch.from_numpy(np.random.RandomState(bits).permutation(self.n))
        for start in range(self.position, self.n, size):
            batch = order[start : start + size]
            # Before the yield: a checkpoint within the loop's body counts this batch.
            self.seek(epoch, start + len(batch))
            yield batch

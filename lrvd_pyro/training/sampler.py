"""A shuffled order of the training examples that can be left and taken up again."""

from collections.abc import Iterator, Mapping
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler


class ResumableSampler(Sampler[int]):
    """Every index below ``n`` once per epoch, in an order that (seed, epoch) fixes.

    Iteration yields what is left of the present epoch, so that a fresh sampler with
    this one's `state_dict` goes on at the next index. It draws from no global random
    number generator.

    Example::

        sampler = ResumableSampler(len(train), seed=0)
        while sampler.epoch < 3:
            for index in sampler.batches(32):             # (32,), fewer at the end
                svi.step(**{k: v[index] for k, v in train.items()})

    Or in a DataLoader, which must have a generator of its own: each ``iter(loader)``
    would draw once from the global one, also the one that follows a resume::

        DataLoader(train, 32, sampler=sampler, generator=torch.Generator())

    Wrong with ``num_workers`` above 0, where the loader fetches batches that are not
    trained on yet: before a checkpoint call ``sampler.seek(epoch, examples)`` with what
    was. Examples that workers augment at random are not reproduced either.

    Args:
        n: The number of examples.
        seed: Of all epochs together, 0 or more.

    Attributes:
        epoch: Epochs completed.
        position: Examples yielded of the present epoch, below ``n``.

    Raises:
        ValueError: If ``n`` or ``seed`` is no such number.
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
        """The indices left of this epoch, ``size`` at a time; fewer in the last batch.

        Raises:
            ValueError: If ``size`` is below 1.
        """
        if size < 1:
            raise ValueError(f"size={size}; expected 1 or more: sampler.batches(32)")
        return self._batches(size)

    def seek(self, epoch: int, position: int) -> None:
        """Go on after the first ``position`` examples of an epoch.

        Raises:
            ValueError: If there is no such place.
        """
        if epoch < 0 or not 0 <= position <= self.n:
            raise ValueError(
                f"epoch={epoch}, position={position}; expected 0 or more, the position "
                f"at most n={self.n}"
            )
        done = position == self.n
        self.epoch, self.position = (epoch + 1, 0) if done else (epoch, position)

    def state_dict(self) -> dict[str, int]:
        """Four numbers: n, seed, epoch, position."""
        return {
            "n": self.n,
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
        }

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise unless `load_state_dict` takes this state.

        Raises:
            ValueError: If it is of other data or another seed.
        """
        if (state["n"], state["seed"]) != (self.n, self.seed):
            raise ValueError(
                f"the saved sampler has n={state['n']}, seed={state['seed']} and this "
                f"one n={self.n}, seed={self.seed}, which is another order; use "
                f"ResumableSampler({state['n']}, seed={state['seed']}) on the same data"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; call it before iterating.

        Raises:
            ValueError: If it is of other data or another seed.
        """
        self.check(state)
        self.seek(int(state["epoch"]), int(state["position"]))

    def _batches(self, size: int) -> Iterator[Tensor]:
        epoch = self.epoch
        # NumPy promises that this stream stays what it is, unlike default_rng's.
        bits = np.random.MT19937(np.random.SeedSequence((self.seed, epoch)))
        order = torch.from_numpy(np.random.RandomState(bits).permutation(self.n))
        for start in range(self.position, self.n, size):
            batch = order[start : start + size]
            self.seek(epoch, start + len(batch))
            yield batch

"""KL weights that rise with the optimization step."""

import math
from collections.abc import Callable
from functools import partial

__all__ = ["linear_warmup"]


def linear_warmup(steps: int) -> Callable[[int], float]:
    """A KL weight that rises linearly from 0 at step 0 to 1 at step ``steps``.

    Args:
        steps: The length of the warm-up in optimization steps; at 0 the weight is 1.

    Returns:
        A function of the step, for ``RankELBO(kl_weight=...)``. It can be pickled.

    Raises:
        ValueError: If ``steps`` is negative or not finite.

    >>> [linear_warmup(4)(step) for step in (0, 1, 4, 9)]
    [0.0, 0.25, 1.0, 1.0]
    """
    if not 0 <= steps < math.inf:
        raise ValueError(
            f"steps={steps}; expected the length of the warm-up, 0 or more: "
            f"linear_warmup(500)"
        )
    return partial(_rise, steps)


def _rise(steps: int, step: int) -> float:
    return 1.0 if step >= steps else step / steps

"""Gates whose scales are shared by modules, layers or all."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pyro import distributions as dist
from torch import Tensor

from lrvd_pyro.priors.base import positive, sample_site
from lrvd_pyro.rank_space.coordinates import Level
from lrvd_pyro.rank_space.space import RankSpace

__all__ = ["Hierarchical", "Horseshoe"]


class Horseshoe:
    """Products of half-Cauchy scales, one per level: the hierarchical gate prior.

    ``gate_i = global_scale * module_scale[m(i)] * rank_scale_i``, each half-Cauchy. The
    tails are heavy at 0 and at infinity, so that most ranks vanish and some stay as
    they are. With a ``slab`` c, ``gate = g / sqrt(1 + (g/c)^2)`` for that product g:
    no gate exceeds c.

    Proper; scales are in units of the gate. Sites, as chosen by ``levels``:
    ``global_scale`` (1,), ``module_scale`` (M,), ``rank_scale`` (R,). The site ``gate``
    (R,) is deterministic.

    Wrong without ``GateLoRA(..., weight_prior=Normal(0, 1))``: with A and B free, the
    map b -> b s undoes the global scale.

    Example::

        prior, on_weights = Horseshoe(0.1), dist.Normal(0, 1)
        model = GateLoRA(net, prior=prior, weight_prior=on_weights, num_data=len(train))

    Args:
        scale: The scale of the highest level's half-Cauchy; lower levels have 1.
        levels: Which of "global", "module" and "rank" there are, from the top.
        slab: The bound c; None for no bound.

    Raises:
        ValueError: If ``scale`` or ``slab`` is not positive, or a level is unknown,
            missing or out of order.

    Source: Carvalho, Polson and Scott (2009). As group prior of layers: Louizos,
    Ullrich and Welling (2017, arXiv 1705.08665). The slab, here without a prior of its
    own: Piironen and Vehtari (2017, arXiv 1707.01694).
    """

    def __init__(
        self,
        scale: float = 1.0,
        *,
        levels: Sequence[Literal["global", "module", "rank"]] = (
            "global",
            "module",
            "rank",
        ),
        slab: float | None = None,
    ) -> None:
        known = ("global", "module", "rank")
        if not levels or tuple(levels) != tuple(x for x in known if x in levels):
            raise ValueError(
                f"levels={levels!r}; expected some of {known}, in this order"
            )
        self.scale = positive("scale", scale)
        self.levels = tuple(levels)
        self.slab = None if slab is None else positive("slab", slab)
        self.start: dict[str, float] = {}
        # The gate starts at 1, and with a slab the product must be larger for that.
        if self.slab is not None and self.slab > 1:
            lowest = f"{self.levels[-1]}_scale"
            self.start[lowest] = 1 / math.sqrt(1 - self.slab**-2)

    def __call__(self, space: RankSpace) -> Tensor:
        gate = space.ones()
        scale = self.scale
        for level in self.levels:
            index = space.group(level)
            each = scale * space.ones(space.count(level))
            gate = (
                gate * sample_site(f"{level}_scale", dist.HalfCauchy(each))[..., index]
            )
            scale = 1.0
        if self.slab is None:
            return gate
        # A product may overflow; at 1e9 slabs the gate is the slab in any dtype.
        gate = gate.clamp(max=1e9 * self.slab)
        return gate / torch.hypot(torch.ones_like(gate), gate / self.slab)


class Hierarchical:
    """Gates of one family, with one scale per module, layer or module type.

    ``scale_g ~ HalfCauchy(1)``, ``gate_i ~ family(scale_g(i))``. Proper where the
    family is. Sites: ``<over>_scale`` (G,) and ``gate`` (R,).

    Wrong without ``GateLoRA(..., weight_prior=Normal(0, 1))``, as every prior with a
    scale: with A and B free, the map b -> b s undoes it.

    Example::

        prior = Hierarchical(partial(dist.Normal, 0.0), over="layer")

    Args:
        family: From scales, ``... x R``, to a distribution of that batch shape:
            ``HalfCauchy``, ``HalfNormal``, ``partial(Normal, 0.0)``.
        over: What shares a scale: "module", "layer" or "type", as in
            `RankSpace.coordinates`.

    Raises:
        TypeError: If ``family`` is not callable.
        ValueError: If ``over`` is none of the three.
    """

    def __init__(
        self,
        family: Callable[[Tensor], dist.TorchDistribution] = dist.HalfCauchy,
        over: Level = "module",
    ) -> None:
        if not callable(family):
            raise TypeError(
                f"family={family!r}; expected a function from scales to a "
                f"distribution: Hierarchical(pyro.distributions.HalfNormal)"
            )
        if over not in ("module", "layer", "type"):
            raise ValueError(f'over={over!r}; expected "module", "layer" or "type"')
        self.family, self.over = family, over

    def __call__(self, space: RankSpace) -> Tensor:
        index = space.group(self.over)
        each = dist.HalfCauchy(space.ones(space.count(self.over)))
        scale = sample_site(f"{self.over}_scale", each)
        return sample_site("gate", self.family(scale[..., index]))

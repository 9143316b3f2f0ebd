"""The rank-wise diagonal guide."""

from typing import Any

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor, nn

from lrvd_pyro.guides.families import family_of, walled
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.naming import UniqueModule, check_registered

DRAWS = 4096  # for moments of gates that are no product of latent sites


class RankDiagonal(UniqueModule):
    """Independent noise on every latent component: one variance per rank component.

    For `GateLoRA`: Normal on the real line, LogNormal (truncated where the prior is)
    on positive sites, all latent levels of the prior included. Under the `LogUniform`
    prior this is ``gate ~ Normal(1, alpha)``. The mean 1 loses nothing while B trains,
    since B absorbs it; so it is held wherever the gate scales with a site of R
    components, and learned elsewhere: of a scale shared by several ranks, of a logit.

    For `FactorLoRA` this makes a `TiedDiagonal`: every element of row i of A (and of
    column i of B) is Normal around its present value with the one variance
    ``sigma_i^2``. Here ``alpha_i = sigma_i^2 d / ||a_i||^2``, with d the length of the
    row (and column).

    Log alpha starts at -4, a noise of 14%; log variances stay within [-10, 8] on real
    sites, [-10, 2] on the logarithm of positive ones, [-20, 2] on weights.

    Wrong when rank components are strongly dependent under the posterior: it then
    understates the uncertainty. Under another gauge of A and B it is another posterior.

    Args:
        model: A `GateLoRA` or `FactorLoRA`.
        learn_mean: Learn all means; for use where A and B are frozen.
        init_log_alpha: Where log alpha starts.

    Raises:
        TypeError: If ``model`` is neither, a latent site of its prior is neither real
            nor positive, or the means are the network's own weights and ``learn_mean``
            is asked for.
    """

    def __new__(cls, model: Any = None, **options: Any) -> "RankDiagonal":
        tied = cls is RankDiagonal and isinstance(model, FactorLoRA)
        guide: RankDiagonal = super().__new__(TiedDiagonal if tied else cls)
        return guide

    def __init__(
        self,
        model: GateLoRA | FactorLoRA,
        *,
        learn_mean: bool = False,
        init_log_alpha: float = -4.0,
    ) -> None:
        super().__init__()
        if not isinstance(model, GateLoRA):
            raise TypeError(
                f"model is a {type(model).__name__}; RankDiagonal guides GateLoRA and "
                f"FactorLoRA, other programs take pyro.infer.autoguide.AutoNormal"
            )
        self.space = model.space
        self._gate_at = model.value_at
        sites = model.latent_sites().items()
        self.families = {name: family_of(name, fn) for name, fn in sites}
        start = model.start()
        powers = self._powers(start)
        self._is_product = None not in powers.values()
        self._held = {
            name: value
            for name, value in start.items()
            if powers[name] == 1 and len(value) == self.space.size and not learn_mean
        }
        families = self.families.items()
        noise = [f.start_log_variance(init_log_alpha, start[n]) for n, f in families]
        self.log_variance = nn.Parameter(torch.cat(noise))
        locs = [f.to_loc(start[n]) for n, f in families if n not in self._held]
        self.loc = nn.Parameter(torch.cat(locs)) if locs else None

    def forward(self, *args: Any, **batch: Any) -> dict[str, Tensor]:
        """Draw the latent sites, whatever the batch; returns their values."""
        for name, parameter in self.named_parameters():
            check_registered(f"{self._pyro_name}.{name}", parameter)
        return {
            name: pyro.sample(name, noise.to_event(1))
            for name, noise in self.distributions().items()
        }

    def distributions(self) -> dict[str, dist.TorchDistribution]:
        """The posterior of each latent site, elementwise."""
        sizes = {name: family.size for name, family in self.families.items()}
        noise = torch.split(self.log_variance, list(sizes.values()))
        learned = [size for name, size in sizes.items() if name not in self._held]
        locs = iter(() if self.loc is None else torch.split(self.loc, learned))
        posteriors = {}
        for (name, family), log_variance in zip(self.families.items(), noise):
            if name in self._held:
                loc = family.to_loc(self._held[name].to(log_variance.device))
            else:
                loc = next(locs)
            posteriors[name] = family.posterior(loc, log_variance)
        return posteriors

    def mean(self) -> Tensor:
        """The posterior mean of the gate, (R,).

        Exact where the gate is a product of latent sites; of 4,096 draws elsewhere.
        """
        if not self._is_product:
            return self._draws().mean(0)
        return self._gate_at({n: q.mean for n, q in self.distributions().items()})

    @property
    def log_alpha(self) -> Tensor:
        """Log noise-to-signal ratio ``Var[gate] / E[gate]^2`` of each component, (R,).

        Exact where the gate is a product of latent sites; of 4,096 draws elsewhere.
        """
        with torch.no_grad():
            if not self._is_product:
                gate = self._draws()
                return (gate.var(0) / gate.mean(0).square()).log()
            spread, one = {}, {}
            for name, q in self.distributions().items():
                mean, variance = q.mean.double(), q.variance.double()
                spread[name] = 1 + variance / mean.square()
                one[name] = torch.ones_like(mean)
            ratio = self._gate_at(spread) / self._gate_at(one)
            return (ratio - 1).log().to(self.log_variance.dtype)

    @property
    def effective_rank(self) -> Tensor:
        """``sum_i 1 / (1 + alpha_i)``, between 0 and R."""
        return torch.sigmoid(-self.log_alpha).sum()

    @property
    def effective_ranks(self) -> dict[str, float]:
        """The effective rank of each LoRA module."""
        kept = torch.sigmoid(-self.log_alpha)
        return {name: float(k.sum()) for name, k in self.space.split(kept).items()}

    def _powers(self, start: dict[str, Tensor]) -> dict[str, int | None]:
        """The power, 0 or 1, of each site in the gate; None where it has none."""
        gate = self._gate_at(start)
        found: dict[str, int | None] = {}
        for name, value in start.items():
            scaled = {c: self._gate_at({**start, name: c * value}) for c in (0.5, 2.0)}
            powers = [
                power
                for power in (0, 1)
                if all(torch.allclose(scaled[c], c**power * gate) for c in scaled)
            ]
            found[name] = powers[0] if powers else None
        return found

    def _draws(self) -> Tensor:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            posteriors = self.distributions().items()
            return self._gate_at({n: q.sample((DRAWS,)) for n, q in posteriors})


class TiedDiagonal(RankDiagonal):
    """`RankDiagonal` for `FactorLoRA`: one variance per rank component of the weights.

    The means are the network's own weights, parameters of the model; the guide has
    ``log_variance`` (R,) alone.
    """

    bounds = (-20.0, 2.0)

    def __init__(
        self,
        model: FactorLoRA,
        *,
        learn_mean: bool = False,
        init_log_alpha: float = -4.0,
    ) -> None:
        UniqueModule.__init__(self)
        if learn_mean:
            raise TypeError(
                "learn_mean=True with FactorLoRA: its means are the network's own "
                "weights, which train already; use RankDiagonal(model)"
            )
        self.space = model.space
        each = torch.arange(self.space.size)
        sides = [each.repeat_interleave(self.space.widths(s)) for s in self.space.sides]
        owner = torch.cat(sides).to(self.space.device)
        self.register_buffer("owner", owner, persistent=False)
        self.log_variance = nn.Parameter(init_log_alpha + self._log_signal().detach())

    def distributions(self) -> dict[str, dist.TorchDistribution]:
        """The posterior of each weight, (K,)."""
        scale = torch.exp(0.5 * walled(self.log_variance, *self.bounds))[self.owner]
        loc = self.mean().to(scale.dtype)
        return {"factor": dist.Normal(loc, scale, validate_args=False)}

    def mean(self) -> Tensor:
        """The network's own weights, as `RankSpace.flatten` lays them out, (K,)."""
        return torch.cat([self.space.flatten(side) for side in self.space.sides])

    @property
    def log_alpha(self) -> Tensor:
        """``log(sigma_i^2 d / ||a_i||^2)`` of each rank component, (R,)."""
        with torch.no_grad():
            return self.log_variance.clamp(*self.bounds) - self._log_signal()

    def _log_signal(self) -> Tensor:
        """Log of the mean square of the weights of each rank component."""
        squares = torch.zeros(self.space.size, device=self.space.device)
        elements = self.mean().detach().to(squares.dtype)
        squares = squares.index_add(0, self.owner, elements.square())
        log: Tensor = (squares / self.owner.bincount()).log()
        return log

"""The rank-wise diagonal Gaussian guide."""

from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor, nn

from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.naming import UniqueModule, check_registered
from lrvd_pyro.priors import latent_sites


class RankDiagonal(UniqueModule):
    """Independent Gaussian noise with one variance per rank component, R parameters.

    For `GateLoRA`: ``gate ~ Normal(1, alpha)``. The mean 1 loses nothing while B
    trains, since B absorbs it; alpha is the noise-to-signal ratio of the component.

    For `FactorLoRA`: every element of row i of A (and of column i of B) is Normal
    around its present value with the one variance ``sigma_i^2``. Here
    ``alpha_i = sigma_i^2 d / ||a_i||^2``, with d the length of the row (and column).

    Log alpha starts at -4, a noise of 14%; the log variance of a gate stays within
    [-10, 8], that of a weight within [-20, 2].

    Wrong when rank components are strongly dependent under the posterior: it then
    understates the uncertainty. Under another gauge of A and B it is another posterior.

    Args:
        model: A `GateLoRA` with the `LogUniform` prior or another with the one latent
            site ``gate`` on the real line; or a `FactorLoRA`.
        learn_mean: Learn the means of the gates too (2R parameters); for use where A
            and B are frozen.
        init_log_alpha: Where log alpha starts.

    Raises:
        TypeError: If ``model`` is neither, or its means are the network's own weights
            and ``learn_mean`` is asked for.
    """

    def __init__(
        self,
        model: GateLoRA | FactorLoRA,
        *,
        learn_mean: bool = False,
        init_log_alpha: float = -4.0,
    ) -> None:
        super().__init__()
        if not isinstance(model, GateLoRA | FactorLoRA):
            raise TypeError(
                f"model is a {type(model).__name__}; RankDiagonal guides GateLoRA and "
                f"FactorLoRA, other programs take pyro.infer.autoguide.AutoNormal"
            )
        if isinstance(model, GateLoRA):
            _check_latent_sites(model)
        elif learn_mean:
            raise TypeError(
                "learn_mean=True with FactorLoRA: its means are the network's own "
                "weights, which train already; use RankDiagonal(model)"
            )
        self.space = model.space
        self.site, self.bounds = "gate", (-10.0, 8.0)
        if self.space.sides:
            self.site, self.bounds = "factor", (-20.0, 2.0)
        self.register_buffer("owner", self._owners(), persistent=False)
        start = init_log_alpha + self._log_signal().detach()
        self.log_variance = nn.Parameter(start)
        self.loc = nn.Parameter(torch.ones_like(start)) if learn_mean else None

    def forward(self, *args: Any, **batch: Any) -> Tensor:
        """Draw the site ``gate`` (R) or ``factor`` (K), whatever the batch."""
        for name, parameter in self.named_parameters():
            check_registered(f"{self._pyro_name}.{name}", parameter)
        scale = torch.exp(0.5 * _walled(self.log_variance, *self.bounds))
        if self.owner is not None:
            scale = scale[self.owner]
        loc = self._means().to(scale.dtype)
        noise = dist.Normal(loc, scale, validate_args=False).to_event(1)
        value: Tensor = pyro.sample(self.site, noise)
        return value

    def mean(self) -> dict[str, Tensor]:
        """The posterior mean of each latent site."""
        return {self.site: self._means()}

    @property
    def log_alpha(self) -> Tensor:
        """Log noise-to-signal ratio of each rank component, (R,)."""
        with torch.no_grad():
            return self.log_variance.clamp(*self.bounds) - self._log_signal()

    @property
    def effective_rank(self) -> Tensor:
        """``sum_i 1 / (1 + alpha_i)``, between 0 and R."""
        return torch.sigmoid(-self.log_alpha).sum()

    @property
    def effective_ranks(self) -> dict[str, float]:
        """The effective rank of each LoRA module."""
        kept = torch.sigmoid(-self.log_alpha)
        return {name: float(k.sum()) for name, k in self.space.split(kept).items()}

    def _means(self) -> Tensor:
        if self.space.sides:
            sides = [self.space.flatten(side) for side in self.space.sides]
            return torch.cat(sides)
        if self.loc is None:
            return torch.ones_like(self.log_variance)
        return self.loc

    def _log_signal(self) -> Tensor:
        """Log of the mean square of what the noise of each component is added to."""
        if not self.space.sides:
            loc = getattr(self, "loc", None)
            one = torch.ones(self.space.size, device=self.space.device)
            return 2 * (one if loc is None else loc.abs()).log()
        squares = torch.zeros(self.space.size, device=self.space.device)
        elements = self._means().detach().to(squares.dtype)
        squares = squares.index_add(0, self.owner, elements.square())
        log: Tensor = (squares / self.owner.bincount()).log()
        return log

    def _owners(self) -> Tensor | None:
        """For each element of the drawn weights its rank component, (K,)."""
        if not self.space.sides:
            return None
        each = torch.arange(self.space.size)
        sides = [each.repeat_interleave(self.space.widths(s)) for s in self.space.sides]
        return torch.cat(sides).to(self.space.device)


class _Walled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.low, ctx.high = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        outward = ((x <= ctx.low) & (grad > 0)) | ((x >= ctx.high) & (grad < 0))
        return grad.masked_fill(outward, 0.0), None, None


def _walled(x: Tensor, low: float, high: float) -> Tensor:
    """``x`` clamped; a gradient step may lead back from a bound, but not beyond it."""
    result: Tensor = _Walled.apply(x, low, high)  # type: ignore[no-untyped-call]
    return result


def _check_latent_sites(model: GateLoRA) -> None:
    sites = latent_sites(model.prior, model.space)
    real = getattr(sites.get("gate", None), "support", None)
    if (
        set(sites) != {"gate"}
        or getattr(real, "base_constraint", real) is not constraints.real
    ):
        raise TypeError(
            f"the prior has the latent sites {sorted(sites)}; RankDiagonal guides the "
            f"one site 'gate' on the real line, others take "
            f"pyro.infer.autoguide.AutoNormal(model)"
        )

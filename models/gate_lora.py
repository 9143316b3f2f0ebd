"""Low-rank variational dropout: one gate per rank component."""

import math
from contextlib import AbstractContextManager
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor, nn
from torch.distributions import Distribution

from lrvd_pyro._compat.pyro import name_in_tree
from lrvd_pyro.likelihoods.base import Likelihood
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.models.factors import Factors
from lrvd_pyro.priors.base import Prior
from lrvd_pyro.priors.contract import check_prior
from lrvd_pyro.priors.log_uniform import LogUniform

__all__ = ["GateLoRA"]


class GateLoRA(RankModel):
    """A LoRA network whose rank components are multiplied by random gates.

    ``y = W0 x + scaling * B diag(z) A x`` in every LoRA module. Here z is the module's
    slice of the one latent vector ``gate`` ~ prior, of length R, the sum of the ranks.
    A, B and the head are point parameters of the model; the base is frozen.

    Under the guide `RankDiagonal`, ``Cov[y] = scaling^2 B diag(alpha (A x)^2) B^T``.
    The covariance has rank r at most, and is zero where ``A x = 0``. On an adapter with
    a center (`gauge.center`) gates act about the center, and ``A x`` stands for the
    distance from it.

    Wrong with a scaled prior and without ``weight_prior``: with A and B free, the map
    b -> b s undoes any scale.

    Example::

        model = GateLoRA(net, num_data=len(train))
        svi = SVI(model, RankDiagonal(model), AdamW(lr=1e-3), loss=RankELBO())
        svi.step(**batch)          # the tokenizer's dict, with labels

    Args:
        net: A PEFT LoRA model, or a Transformers network after
            ``net.add_adapter``.
        prior: From a `RankSpace` to the gate; see `lrvd_pyro.priors`.
        likelihood: The distribution of labels given the network's logits; see
            `lrvd_pyro.likelihoods`.
        num_data: The number of training examples N; a batch of B counts N/B times.
        weight_prior: A density of the elements of A and B, added to the objective as a
            penalty in nats. Priors with a scale need it.
        adapter: The adapter's name; None takes the single active one.

    Raises:
        TypeError: If ``net`` has no LoRA layers, a layer cannot be gated, or
            ``num_data`` is missing. If ``prior`` is not a function, or ``weight_prior``
            not a density of single weights.
        ValueError: If the adapter is ambiguous, the prior breaks its contract, or its
            parameters belong to another model.

    Source: Doyle, Chan, Hu and Leontjeva (2026, arXiv 2506.22809), as its theory
    states it.
    """

    binds = "gates"

    def __init__(
        self,
        net: nn.Module,
        *,
        prior: Prior | None = None,
        likelihood: Likelihood | None = None,
        num_data: int | None = None,
        weight_prior: Distribution | None = None,
        adapter: str | None = None,
    ) -> None:
        _check_densities(prior, weight_prior)
        super().__init__(
            net,
            num_data=num_data,
            prior=LogUniform() if prior is None else prior,
            likelihood=likelihood,
            adapter=adapter,
        )
        self.weight_prior = weight_prior
        self._centered = _is_centered(weight_prior)
        with self.space.binding.closed_on_failure():
            self._prior_names_gate = check_prior(self.prior, self.space)

    def draw(self) -> Tensor:
        """Draw the gates, ``R``; ``B x R`` when drawn per example."""
        gate: Tensor = self.prior(self.space)
        # A product of sites is not a site, and `gate` is always in the trace.
        if not self._prior_names_gate:
            gate = pyro.deterministic("gate", gate, event_dim=1)
        if self.weight_prior is not None:
            weights = self.space.weights("lora_A") + self.space.weights("lora_B")
            # A Unit is Pyro's factor. The mark keeps the penalty out of the likelihood,
            # so that RankELBO weights it as it does the KL.
            penalty = dist.Unit(self._log_density(weights))
            nothing = gate.new_empty(0)
            mark: Any = {"is_weight_prior": True}
            pyro.sample("weight_prior", penalty, obs=nothing, infer=mark)
        return gate

    def _log_density(self, weights: list[nn.Parameter]) -> Tensor:
        """The log density of all elements of A and B together, in nats."""
        prior: Any = self.weight_prior
        if not self._centered:
            elements = torch.cat([w.reshape(-1) for w in weights])
            log_prob: Tensor = prior.log_prob(elements).sum()
            return log_prob
        # By norms, since the backward pass then keeps nothing but the weights. Half
        # precision would lose the sum of so many squares.
        exact = torch.promote_types(weights[0].dtype, torch.float32)
        norms = [torch.linalg.vector_norm(w, dtype=exact) for w in weights]
        scale = prior.scale.to(exact).reshape(())
        squares = torch.stack(norms).square().sum() / scale.square()
        count = sum(w.numel() for w in weights)
        constant = scale.log() + 0.5 * math.log(2 * math.pi)
        log_density: Tensor = -0.5 * squares - count * constant
        return log_density

    def bind(self, value: Tensor) -> AbstractContextManager[None]:
        """Gate the forward passes within the block."""
        return self.space.bind(value)

    def factors(self, value: Tensor) -> dict[str, Factors]:
        """The network's own A and B, and the gates between them."""
        gates = self.space.split(value)
        sides = self.space.weights("lora_A"), self.space.weights("lora_B")
        return {n: Factors(A, B, z) for (n, z), A, B in zip(gates.items(), *sides)}


def _is_centered(prior: Distribution | None) -> bool:
    """Whether a prior is Normal(0, scale), and remains so."""
    # By type: a subclass may have a density of its own.
    known = type(prior) in (torch.distributions.Normal, dist.Normal)
    if not known or not isinstance(prior, torch.distributions.Normal):
        return False
    loc: Tensor = prior.loc
    one = loc.numel() == prior.scale.numel() == 1
    return one and not loc.requires_grad and not bool(loc.any())


def _check_densities(prior: object, weight_prior: object) -> None:
    is_function = callable(prior) and not isinstance(prior, type)
    if prior is not None and (not is_function or isinstance(prior, Distribution)):
        raise TypeError(
            f"prior is {prior!r}; expected a function from the RankSpace to the gate: "
            f"priors.Normal(1.0), or a function of your own"
        )
    # Pyro's store names parameters by the path from the root, so that a module with
    # parameters has one parent only.
    if owner := name_in_tree(prior):
        raise ValueError(
            f"this prior's parameters are {owner!r} already; give each model its own: "
            f"prior={type(prior).__name__}()"
        )
    is_density = isinstance(weight_prior, Distribution) and not weight_prior.event_shape
    if weight_prior is not None and not is_density:
        raise TypeError(
            f"weight_prior is {weight_prior!r}; expected a density of single weights: "
            f"pyro.distributions.Normal(0.0, 1.0)"
        )

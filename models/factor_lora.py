"""BayesLoRA by its published code: Gaussian noise on the weights A (and B)."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from lrvd_pyro.likelihoods.base import Likelihood
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.models.factors import Factors, SiteLabels
from lrvd_pyro.priors.log_uniform import LogUniform
from lrvd_pyro.rank_space.rows import Side

__all__ = ["FactorLoRA"]


class FactorLoRA(RankModel):
    """A LoRA network whose weights A (and B, by option) are drawn.

    ``y = W0 x + scaling * B A x`` in every LoRA module, with A (and B) ~ prior. The one
    latent vector ``factor`` (K,) holds the weights themselves, rank component by rank
    component: rows of A, then columns of B. In a convolution the row of a component is
    its kernel. Its prior is log-uniform on every element.
    The guide `TiedDiagonal` centers it on the network's own weights, with one variance
    per rank component.

    The KL counts ``in`` (and ``out``) elements per rank component; in a convolution
    ``in`` times the size of the kernel. At the true ELBO it
    outweighs a small data set and prunes every rank: use ``RankELBO(kl_weight=...)``
    below 1, and say so. With noise on A alone, ranks of large log alpha still carry
    signal; with noise on both sides they hardly do.

    Wrong where noise should vanish with ``A x``: this noise does not. Its size also
    depends on the gauge of A and B.

    Example::

        model = FactorLoRA(net, num_data=len(train), sides=("lora_A", "lora_B"))
        svi = SVI(model, TiedDiagonal(model), AdamW(), loss=RankELBO(kl_weight=0.1))

    Args:
        net: A PEFT LoRA model on linear layers and convolutions, or a Transformers
            network after ``net.add_adapter``.
        prior: `lrvd_pyro.priors.LogUniform`, the only one.
        likelihood: The distribution of labels given the network's logits; see
            `lrvd_pyro.likelihoods`.
        num_data: The number of training examples N; a batch of B counts N/B times.
        sides: Which weights are random: ``("lora_A",)`` or ``("lora_A", "lora_B")``.
        adapter: The adapter's name; None takes the single active one.

    Raises:
        TypeError: If ``net`` has no LoRA layers, a layer's weights cannot be drawn, the
            prior is another one, or ``num_data`` is missing.
        ValueError: If the adapter is ambiguous or ``sides`` is neither of the two.

    Source: the code published with Doyle, Chan, Hu and Leontjeva (2026, arXiv
    2506.22809): additive noise, one log variance per rank.
    """

    binds = "weights"

    def __init__(
        self,
        net: nn.Module,
        *,
        prior: LogUniform | None = None,
        likelihood: Likelihood | None = None,
        num_data: int | None = None,
        sides: tuple[Side, ...] = ("lora_A",),
        adapter: str | None = None,
    ) -> None:
        if prior is not None and not isinstance(prior, LogUniform):
            raise TypeError(
                f"prior is {prior!r}; FactorLoRA has a log-uniform prior on every "
                f"weight: priors.LogUniform(). GateLoRA takes any prior"
            )
        if sides not in (("lora_A",), ("lora_A", "lora_B")):
            raise ValueError(
                f"sides={sides!r}; expected ('lora_A',) or ('lora_A', 'lora_B')"
            )
        super().__init__(
            net,
            num_data=num_data,
            prior=LogUniform() if prior is None else prior,
            likelihood=likelihood,
            sides=sides,
            adapter=adapter,
        )

    def start(self) -> dict[str, Tensor]:
        """Where guides start: at the network's own weights, (K,)."""
        return {"factor": self.space.flatten(*self.space.sides).detach()}

    def draw(self) -> Tensor:
        """Draw the weights, ``K``; ``B x K`` when drawn per example."""
        weights = [w for side in self.space.sides for w in self.space.weights(side)]
        size = sum(w.numel() for w in weights)
        value: Tensor = self.prior.sample("factor", size, self.space.device)
        return value

    def bind(self, value: Tensor) -> AbstractContextManager[None]:
        """Use the drawn weights in the forward passes within the block."""
        return self.space.bind_weights(value)

    def factors(self, value: Tensor) -> dict[str, Factors]:
        """The drawn weights, and the network's own weights of a side not drawn."""
        drawn = self.space.unflatten(value)
        As, Bs = (drawn.get(s) or self.space.weights(s) for s in ("lora_A", "lora_B"))
        ones = self.space.split(self.space.ones()).items()
        return {n: Factors(A, B, one) for (n, one), A, B in zip(ones, As, Bs)}

    def site_labels(self, site: str) -> SiteLabels | None:
        """The coordinates of each weight's rank component, and the weight's side."""
        space, owners, sides = self.space, list[int](), list[str]()
        for side in space.sides:
            each = torch.arange(space.size).repeat_interleave(space.widths(side))
            owners += each.tolist()
            sides += [side] * len(each)
        places = space.coordinates.items()
        labels = {name: [each[i] for i in owners] for name, each in places}
        return "weight_id", {**labels, "side": sides}

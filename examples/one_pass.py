"""Ways to a posterior around a trained LoRA, for benchmarks/gauge.py."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from pyro.infer import SVI
from small_task import LR, logits
from text_data import Encoded
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro.gauge import bayesianize, gramians, optimal_alpha
from lrvd_pyro.likelihoods.categorical import Categorical
from lrvd_pyro.priors.gaussian import ARD, Normal
from lrvd_pyro.priors.log_uniform import LogUniform

SAMPLES = 16
Predict = Callable[[Encoded], Tensor]
Built = tuple[Predict, Callable[[], None]]


def one_pass(
    net: PeftModel,
    batches: list[Any],
    *,
    cap: float = 8.0,
    refit: str = "",
    prior: Callable[[], Any] = LogUniform,
    **options: Any,
) -> Built:
    """`bayesianize`, then log alpha capped, or an epoch of SVI on the true ELBO.

    ``refit`` is "noise" (A, B and head frozen) or "all" (at a tenth of the rate).
    """
    model, guide = bayesianize(
        net,
        batches,
        likelihood=Categorical(),
        prior=prior(),
        generator=fixed(),
        **options,
    )
    guide.log_variance.data.clamp_(max=cap)
    if refit:
        trained = [p for p in net.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(refit == "all")
        optim = lrvd.optim.AdamW(lr=LR / 10, variational_lr=0.1)
        svi = SVI(model, guide, optim, loss=lrvd.RankELBO())
        for batch in batches:
            svi.step(**batch)
        for parameter in trained:
            parameter.requires_grad_()

    def predict(data: Encoded) -> Tensor:
        probs: Tensor = lrvd.predict(model, guide, data.in_order(), SAMPLES).probs
        return probs

    def release() -> None:
        model.space.close()
        model.release()
        guide.release()

    return predict, release


def over_the_core(net: PeftModel, batches: list[Any]) -> Built:
    """``C ~ N(I, v)`` between B and A, all r x r entries, the factored Fisher for each.

    In the balanced gauge that is ``F_ij = t_i t_j``; ``v = 1 / (F + 1)``, the best
    noise under C ~ N(0, 1).
    """
    model, guide = bayesianize(net, batches, likelihood=Categorical())
    guide.release()
    found = gramians(model, batches, generator=fixed())
    weights = model.space.weights("lora_B")
    before = [w.detach().clone() for w in weights]
    diagonals = [
        torch.outer(found.gradients[m].diagonal(), found.activations[m].diagonal())
        for m in model.space.modules
    ]
    scales = [optimal_alpha(f, Normal(1.0)).sqrt().float() for f in diagonals]

    @torch.no_grad()
    def predict(data: Encoded) -> Tensor:
        noise, total = fixed(), torch.zeros(())
        for _ in range(SAMPLES):
            for w, b, scale in zip(weights, before, scales):
                w.copy_(b + b @ (scale * torch.randn(scale.shape, generator=noise)))
            total = total + logits(net, data).softmax(-1) / SAMPLES
        return total

    def release() -> None:
        model.space.close()
        model.release()

    return predict, release


def fixed() -> torch.Generator:
    """What labels and cores are drawn with."""
    return torch.Generator().manual_seed(0)


# how to build each, and whether it is scored on test too
POSTERIORS: dict[str, tuple[Callable[..., Built], bool]] = {
    "trained gauge": (partial(one_pass, balance=False), True),
    "balanced gauge": (one_pass, True),
    "balanced, multiplicity 2": (
        partial(one_pass, prior=partial(LogUniform, 2.0)),
        True,
    ),
    "centered gauge": (partial(one_pass, centered=True), True),
    "centered, multiplicity 2": (
        partial(one_pass, centered=True, prior=partial(LogUniform, 2.0)),
        True,
    ),
    "balanced, multiplicity 4": (
        partial(one_pass, prior=partial(LogUniform, 4.0)),
        False,
    ),
    "balanced, log alpha at most 1": (partial(one_pass, cap=1.0), False),
    "balanced, ARD": (partial(one_pass, prior=ARD), False),
    "balanced, noise refitted": (partial(one_pass, refit="noise"), False),
    "balanced, one joint epoch": (partial(one_pass, refit="all"), False),
    "balanced, whole core, N(0, 1)": (over_the_core, False),
}

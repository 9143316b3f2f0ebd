"""Second moments of the rank activations and of their gradients, module by module."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import pyro
import torch
from pyro import poutine
from torch import Tensor
from tqdm.std import tqdm

from lrvd_pyro.batches import (
    Batch,
    batch_size,
    check_several,
    gate_rows,
    without_labels,
)
from lrvd_pyro.gauge.token_sums import OVERFLOW, Sums, tapped
from lrvd_pyro.inference.terms import log_prob_by_datum
from lrvd_pyro.inference.threads import alone_in_pyro
from lrvd_pyro.models.base import RankModel, evaluating
from lrvd_pyro.models.checks import check_gates
from lrvd_pyro.models.singles import separable
from lrvd_pyro.predictive.draws import seeded

__all__ = ["Gramians", "gramians", "seeded_by"]

_ROUNDING = 1e-12  # of a covariance, relative to the second moments
_Labels = Literal["sampled", "observed"]
_Gates = Literal["ones", "subsets"]


@dataclass(frozen=True)
class Gramians:
    """Second moments of rank activations and of their gradients, in float64.

    Attributes:
        activations: For each module G, the mean over tokens of ``h h^T``, ``r x r``.
        gradients: For each module M, the sum over tokens and data of ``g g^T``,
            ``r x r``, in nats^2 per data set.
        gate_fisher: ``F_i = sum_n (sum_t h_ti g_ti)^2``, the exact diagonal Fisher
            information of the gates in the present gauge, (R,), per data set. It is
            empty where it was not measured (`BalanceSchedule`).
        means: For each module the mean of h over the same tokens, ``r``.
    """

    activations: dict[str, Tensor]
    gradients: dict[str, Tensor]
    gate_fisher: Tensor = field(default_factory=lambda: torch.empty(0))
    means: dict[str, Tensor] = field(default_factory=dict)

    def centered(self, about: Mapping[str, Tensor] | None = None) -> "Gramians":
        """The second moments about a point, ``mean (h - c) (h - c)^T``.

        The gradients stay; means and gate Fisher information are left out.

        Args:
            about: c of each module, ``r``. None takes the means: G is then a
                covariance, and 0 for inputs that never change.

        Raises:
            ValueError: If there are no means, as after `centered`.
        """
        means = self.require_means()
        activations = {}
        for name, gram in self.activations.items():
            mean = means[name]
            offset = mean - (mean if about is None else about[name].to(mean))
            covariance = gram - torch.outer(mean, mean)
            # For inputs that never change, only rounding beside the mean is left. Its
            # directions mean nothing, and `balance` would scale them up.
            varies = covariance.trace() > _ROUNDING * gram.trace()
            activations[name] = covariance * varies + torch.outer(offset, offset)
        return Gramians(activations, self.gradients)

    def require_means(self) -> dict[str, Tensor]:
        """The means of all modules; raises a ValueError if there are none."""
        if self.means.keys() != self.gradients.keys():
            raise ValueError(
                "the Gramians have no means, or are centered already; take them again: "
                "gramians(model, batches)"
            )
        return self.means


def gramians(
    model: RankModel,
    batches: Iterable[Batch],
    *,
    labels: _Labels = "sampled",
    gates: _Gates = "ones",
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Gramians:
    """The second moments that `balance` makes equal, from one pass over data.

    Let h = A x be the rank activations of a module, and
    ``g = d log p(y | x) / d h`` their gradients, at gates of 1 in eval mode. Then
    ``G = mean h h^T`` over tokens, and ``M = (N/n) sum g g^T`` over tokens and the n
    examples of ``batches``. Tokens whose gradient is exactly 0, such as padding, count
    in neither. The cost is one forward and one backward pass per batch, and O(r^2)
    memory per module. Where a layer mixes the rows of examples, they run one at a time
    (`separable`).

    Example::

        found = gramians(model, batches)
        balance(net, found)

    Args:
        model: A `GateLoRA`, or another model of gates; its guide plays no part.
        batches: Dicts of tensors as the model takes them.
        labels: "sampled" draws labels from the network's own predictive, so that M
            belongs to the true Fisher information. "observed" takes those of the
            batches: the empirical Fisher, which vanishes where the network fits.
        gates: "ones" for `balance` and `optimal_alpha`. With "subsets" each example has
            gates of 1 in a random subset of the ranks and of 0 elsewhere. The size of
            the subset is uniform from 0 to R. Only ``gate_fisher`` is returned then. It
            says what a rank is worth when others are missing, and orders ranks for
            keeping few.
        generator: The random state of labels and subsets; None continues torch's
            global one.
        progress: Show a bar over the batches.

    Returns:
        The `Gramians`, per data set.

    Raises:
        TypeError: If the model draws no gates, or ``batches`` is one batch.
        ValueError: If there are no batches, or a choice is not one of those above. If
            the likelihood cannot sample, or labels are missing. If a gradient is not
            finite, or as `separable` raises it.
        RuntimeError: If the adapter is merged, disabled, inactive or deleted.

    Wrong as a curvature where tokens depend on each other, or gradients on activations:
    G and M are its two factors. ``gate_fisher`` is exact.

    Source: the true Fisher by sampled labels, Kunstner, Balles and Hennig (2019, arXiv
    1905.12558); factored second moments, Martens and Grosse (2015, arXiv 1503.05671);
    subsets weighted as by Shapley (1953), for the Fisher information derived here.
    """
    check_gates(model, "the gauge", "take GateLoRA(net, num_data=len(train))")
    if labels not in get_args(_Labels):
        raise ValueError(f'labels={labels!r}; expected "sampled" or "observed"')
    if gates not in get_args(_Gates):
        raise ValueError(f'gates={gates!r}; expected "ones" or "subsets"')
    check_several(batches, "gramians(model, [batch])")
    sums, count = Sums(model.space.ranks), 0
    fisher = torch.zeros(model.space.size, dtype=torch.float64)
    with evaluating(model), seeded_by(generator):
        shown = tqdm(batches, disable=not progress, desc="gramians")
        for batch in separable(model, shown):
            # The tokens of an example share its gate: they add up before the square.
            gradients = _gate_gradients(model, batch, labels, gates, sums)
            fisher += gradients.square().sum(0).cpu()
            count += batch_size(batch)
    if count == 0:
        raise ValueError(
            "got no batches; expected the training set: gramians(model, batches)"
        )
    modules, whole = model.space.modules, model.num_data / count
    if gates == "subsets":
        return Gramians({}, {}, whole * fisher)
    return Gramians(
        activations=dict(zip(modules, sums.mean_activations(), strict=True)),
        gradients={m: whole * s for m, s in zip(modules, sums.gradients, strict=True)},
        gate_fisher=whole * fisher,
        means=dict(zip(modules, sums.means(), strict=True)),
    )


def _gate_gradients(
    model: RankModel, batch: Batch, labels: _Labels, gates: _Gates, sums: Sums
) -> Tensor:
    """Each example's gradient in its gates, ``B x R``; adds its tokens to ``sums``."""
    inputs = without_labels(batch)
    observed = batch.get("labels") if labels == "observed" else None
    if labels == "observed" and observed is None:
        raise ValueError('a batch has no labels; expected labels, or labels="sampled"')
    rows = gate_rows(model.space.ones(), batch)
    if gates == "subsets":
        # A uniform share makes all subset sizes equally likely, as Shapley weighs them.
        share = torch.rand_like(rows[:, :1])
        rows = (torch.rand_like(rows) < share).to(rows).requires_grad_()
    with torch.enable_grad(), tapped(model, sums.add), model.bind(rows):
        log_prob = _log_likelihood(model, model.predictions(**inputs), observed)
        (gradients,) = torch.autograd.grad(log_prob, rows)
    return gradients.double()


def _log_likelihood(
    model: RankModel, predictions: Tensor, labels: Tensor | None
) -> Tensor:
    """The log density of a batch of labels, sampled if None; in nats, not scaled."""
    if not predictions.isfinite().all():
        raise ValueError("the network's predictions are not finite; " + OVERFLOW)
    try:
        # The site's own distribution gives the density without the plate's N/B.
        with alone_in_pyro(), poutine.block(), pyro.validation_enabled(False):
            program = poutine.trace(model.likelihood)
            run = program.get_trace(predictions, labels, model.num_data)
        site: Any = run.nodes["labels"]
        log_prob = log_prob_by_datum(site, len(predictions)).sum()
    except (NotImplementedError, KeyError) as error:
        raise ValueError(
            f"{type(model.likelihood).__name__} draws no site 'labels' ({error!r}); "
            f'call gramians(..., labels="observed"), or use a likelihood that samples'
        ) from error
    return log_prob


@contextmanager
def seeded_by(generator: torch.Generator | None) -> Iterator[None]:
    """Draw from a seed of the generator within the block; None draws as it is.

    Layers and likelihoods draw from torch's global state and take no generator. So the
    generator gives a seed for that state, which is restored after the block.
    """
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with seeded(seed):
        yield

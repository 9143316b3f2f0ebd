"""Laplace's approximation by the Fisher information of the gates."""

from collections.abc import Iterable, Sequence

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoMultivariateNormal
from torch import Tensor
from torch.autograd.functional import hessian, jacobian
from torch.distributions import biject_to

from lrvd_pyro._compat.pyro import unpack_latent
from lrvd_pyro.batches import Batch, check_several, gate_rows, without_labels
from lrvd_pyro.guides.limits import refuse_large
from lrvd_pyro.inference.param_store import give_own_name, waits_for_first_call
from lrvd_pyro.likelihoods.base import curvature_of
from lrvd_pyro.models.base import RankModel, evaluating
from lrvd_pyro.models.singles import separable

__all__ = ["FisherLaplace", "gate_fisher"]


class FisherLaplace(AutoLaplaceApproximation):
    """A MAP guide whose curvature comes from the exact Fisher information of the gates.

    Train it as any guide; then `laplace_approximation` gives the Gaussian
    ``N(u*, (J^T F J + H)^-1)`` over the unconstrained latents u. F is the gates' Fisher
    information over the data set. J is the Jacobian of the gate in u, and H the Hessian
    of the negative log prior. Of the network only first derivatives are taken, since
    attention kernels have no second ones.

    Wrong where the posterior is skewed or has several modes. Under priors with a pole
    at zero the mode itself says little.

    Example::

        guide = laplace(model)                   # a FisherLaplace with the right start
        svi = SVI(model, guide, optim, loss=RankELBO())
        svi.step(**batch)                        # and so on, to the mode
        gaussian = guide.laplace_approximation(batches)

    Args:
        model: A model that binds gates.
        options: Arguments of Pyro's AutoLaplaceApproximation.

    Source: MacKay (1992); with the Fisher information, Daxberger et al. (2021, arXiv
    2106.14806).
    """

    def __init__(self, model: RankModel, **options: object) -> None:
        super().__init__(model, **options)  # type: ignore[no-untyped-call]
        # In a tuple: as a child, the model would share its parameters with the guide.
        # Pyro's own ``self.model`` is that model within handlers, and not a RankModel.
        self._rank_model = (model,)

    def laplace_approximation(self, batches: Sequence[Batch]) -> AutoMultivariateNormal:
        """The Gaussian guide at the present point.

        Args:
            batches: The training set, a list of batches. Labels are not needed.

        Returns:
            A guide over the same latents, with a name of its own in Pyro's store.

        Raises:
            TypeError: If ``batches`` is one batch.
            ValueError: If the guide has not been trained, there are more than 4,096
                latent components, the network takes no gate per
                example (DoRA; ``curvature="hessian"`` needs none), or the curvature is
                not positive definite.
        """
        check_several(batches, "laplace_approximation([batch])")
        if waits_for_first_call(self):
            raise ValueError(
                f"{type(self).__name__} has no parameters yet; train it first: "
                f"svi.step(**batch)"
            )
        loc = self.loc.detach()
        refuse_large(loc.numel(), "Laplace's covariance")
        gate, spread = self._gate(loc), jacobian(self._gate, loc)
        try:
            fisher = gate_fisher(self._rank_model[0], gate.detach(), batches)
        except ValueError as error:
            remedy = "laplace(model, curvature='hessian') needs no gate per example"
            error.add_note(remedy)
            raise
        precision = spread.T @ fisher @ spread + hessian(self._negative_log_prior, loc)
        # These two report failure instead of raising, so the error names an eigenvalue.
        covariance, failed = torch.linalg.inv_ex(precision)
        scale_tril, not_positive = torch.linalg.cholesky_ex(covariance)
        if failed or not_positive:
            least = torch.linalg.eigvalsh(precision)[0]
            raise ValueError(
                f"the curvature is not positive definite (least eigenvalue {least:.2g})"
                f": this point is not a mode; train the guide longer, or use "
                f"multivariate_normal(model)"
            )
        scale = covariance.diagonal().sqrt()
        # Without labels in the batch, the site would be one more latent.
        latents_only = poutine.block(self._rank_model[0], hide=["labels"])
        guide = give_own_name(AutoMultivariateNormal(latents_only))
        guide(**batches[0])
        # Buffers in place of parameters: the approximation is not trained.
        buffers = {
            "loc": loc,
            "scale": scale,
            "scale_tril": scale_tril / scale[:, None],
        }
        for name, value in buffers.items():
            delattr(guide, name)
            guide.register_buffer(name, value)
        return guide

    def _latents(self, unconstrained: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The latents, and the log Jacobian determinant of the map to them."""
        latents, volume = {}, unconstrained.new_zeros(())
        for site, value in unpack_latent(self, unconstrained):
            transform = biject_to(site["fn"].support)
            latents[site["name"]] = transform(value)
            volume = (
                volume
                + transform.log_abs_det_jacobian(value, latents[site["name"]]).sum()
            )
        return latents, volume

    def _gate(self, unconstrained: Tensor) -> Tensor:
        latents, _ = self._latents(unconstrained)
        return self._rank_model[0].value_at(latents)

    def _negative_log_prior(self, unconstrained: Tensor) -> Tensor:
        latents, volume = self._latents(unconstrained)
        return -self._rank_model[0].log_prior(latents) - volume


def gate_fisher(model: RankModel, gate: Tensor, batches: Iterable[Batch]) -> Tensor:
    """The Fisher information of the data set about the gates, ``R x R``.

    ``F = (N/n) sum_i E_y[g g^T]``, ``g = d log p(y | x_i, z) / dz`` at ``z = gate``.
    The sum is over the n examples of ``batches``, with y from the model's own
    predictive. F is the Gauss-Newton matrix, exact. Gates enter per example, so each
    batch costs one forward pass and a backward pass per class. The network runs in eval
    mode.

    Args:
        model: A model that binds gates.
        gate: The gate z, ``R``.
        batches: Batches of the training set, with or without labels. Where they are a
            part of it, they stand for all of it.

    Returns:
        F, in nats per data set and squared unit of the gate.

    Raises:
        ValueError: If no batch is given, or as `separable` raises it.
    """
    likelihood = curvature_of(model.likelihood, "the Fisher information of gates")
    total, count = gate.new_zeros(len(gate), len(gate)), 0
    with torch.enable_grad(), evaluating(model):
        for batch in separable(model, batches):
            gates = gate_rows(gate, batch)
            with model.bind(gates):
                predictions = model.predictions(**without_labels(batch))
            # An example's gates move its own roots only, so that the gradient of the
            # sum over examples has one row for each of them.
            for root in likelihood.fisher_roots(predictions).sum(0):
                (gradient,) = torch.autograd.grad(root, gates, retain_graph=True)
                total += gradient.T @ gradient
            count += len(gates)
    if count == 0:
        raise ValueError("got no batches; expected the training set")
    return total * model.num_data / count

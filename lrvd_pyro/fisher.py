"""The Fisher information of the gates."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lrvd_pyro.batches import gate_rows, without_labels
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.predict import evaluating


def gate_fisher(
    model: RankModel, gate: Tensor, batches: Iterable[Mapping[str, Any]]
) -> Tensor:
    """The Fisher information of the data set about the gates, R x R.

    ``F = (N/n) sum_i E_y[s s^T]``, ``s = d log p(y | x_i, z) / dz`` at ``z = gate``,
    y from the model's own predictive, over the n examples of ``batches``: the
    Gauss-Newton matrix, exact. Gates enter per example, so each batch costs one forward
    pass and a backward pass per class. The network runs in eval mode.

    Raises:
        ValueError: If there is no batch, or the network takes no gate per example
            (DoRA; layers whose first axis is not the batch).
    """
    total, count = gate.new_zeros(len(gate), len(gate)), 0
    for batch in batches:
        inputs = without_labels(batch)
        gates = gate_rows(gate, inputs)
        with torch.enable_grad(), evaluating(model), model.bind(gates):
            roots = model.likelihood.fisher_roots(model.predictions(**inputs))
        for root in roots.sum(0):
            (score,) = torch.autograd.grad(root, gates, retain_graph=True)
            total += score.T @ score
        count += len(gates)
    if count == 0:
        raise ValueError("got no batches; expected the training set")
    return total * model.num_data / count

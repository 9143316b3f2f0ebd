"""The linearized predictive of drawn weights."""

from typing import Any

import nets
import pytest
import torch
from nets import tokens
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RowDiagonal, TiedDiagonal
from lrvd_pyro.models import FactorLoRA
from lrvd_pyro.predictive.linearized import Linearized, gate_gaussian

SIDES = ("lora_A", "lora_B")


NETS: dict[str, tuple[Any, Any]] = {
    "bert": (nets.bert, tokens),
    "perceptron": (nets.perceptron, nets.rows),
}


def covariances(model: Any, guide: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Of the contrasts, linearized and of draws."""
    inputs = {name: v for name, v in batch.items() if name != "labels"}
    exact = Linearized(model, gate_gaussian(model, guide, inputs)).contrasts(inputs)[1]
    drawn = lrvd.predict(model, guide, [inputs], 4000, return_samples=True).samples
    contrasts = (drawn[..., 1:] / drawn[..., :1]).log()
    centered = contrasts - contrasts.mean(0)
    return exact, torch.einsum("sbj,sbk->bjk", centered, centered) / 4000


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("family", [RowDiagonal, TiedDiagonal])
def test_the_linearized_predictive_of_weights_is_that_of_small_draws(
    family: Any, net: str
) -> None:
    make, batch_of = NETS[net]
    model = FactorLoRA(make(), num_data=60, sides=SIDES)
    guide, batch = family(model, init_log_alpha=-9.0), batch_of(4)
    exact, drawn = covariances(model, guide, batch)
    torch.testing.assert_close(drawn, exact, rtol=0.25, atol=0.05 * float(exact.max()))
    guide.linearized_scale = 3.0  # the twin: draws do not know of it
    widened, again = covariances(model, guide, batch)
    torch.testing.assert_close(widened, 3 * exact)
    torch.testing.assert_close(again, drawn)

"""Networks, heads and adapters of 16 bits train as those of 32 do."""

import math
from contextlib import nullcontext
from typing import Any

import pyro
import pytest
import torch
from nets import bert_config, tokens
from pairs import state
from peft import LoraConfig, PeftModel, get_peft_model
from pyro.infer import SVI
from torch import Tensor, nn
from transformers import BertForSequenceClassification

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA

MILLION = 1_000_000


def half_bert(dtype: torch.dtype, *, cast: bool = True) -> PeftModel:
    """A head in 16 bits, and LoRA in float32 if ``cast``."""
    net = BertForSequenceClassification(bert_config(1)).to(dtype).eval()
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS"
    )
    return get_peft_model(net, config, autocast_adapter_dtype=cast)


SIXTEEN = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


@SIXTEEN
@pytest.mark.parametrize("noise", ["example", "batch"])
@pytest.mark.parametrize("cast", [True, False])
def test_half_precision_learns_at_a_million_examples(
    dtype: torch.dtype, noise: Any, cast: bool
) -> None:
    torch.set_default_dtype(torch.float32)
    model = GateLoRA(half_bert(dtype, cast=cast), num_data=MILLION)
    elbo = lrvd.RankELBO(noise=noise)
    svi = SVI(model, RankDiagonal(model), lrvd.optim.AdamW(lr=1e-2), loss=elbo)
    head = model.base_net.base_model.model.classifier.modules_to_save.default.weight
    assert head.dtype is dtype
    batch = tokens(8)
    before = head.detach().clone()
    losses = [svi.step(**batch) / MILLION for _ in range(40)]
    assert sum(losses[-5:]) / 5 < losses[0] - 0.1
    assert all(p.isfinite().all() for p in model.parameters())
    assert head.dtype is dtype and not torch.equal(head, before)
    # Adam's steps are of the size of the learning rate, whatever the scale.
    assert 0.2 < (head - before).abs().max() < 0.5


class WithinForward(nn.Module):
    """Enters autocast within its forward pass, as Accelerate has networks do."""

    def __init__(self, dtype: torch.dtype, enabled: bool) -> None:
        super().__init__()
        self.bert = BertForSequenceClassification(bert_config(1))
        self.dtype, self.enabled = dtype, enabled

    def forward(self, **inputs: Tensor) -> Tensor:
        within = torch.autocast("cpu", self.dtype) if self.enabled else nullcontext()
        with within:
            logits = self.bert(**inputs).logits
        return logits.float()


@SIXTEEN
@pytest.mark.parametrize("outside", [True, False])
def test_under_autocast_it_learns_at_a_million_examples_wherever_autocast_is(
    dtype: torch.dtype, outside: bool
) -> None:
    torch.set_default_dtype(torch.float32)
    net: Any = WithinForward(dtype, enabled=not outside).eval()
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
    )
    model = GateLoRA(get_peft_model(net, config), num_data=MILLION)
    svi = SVI(
        model, RankDiagonal(model), lrvd.optim.AdamW(lr=1e-2), loss=lrvd.RankELBO()
    )
    batch = tokens(8)
    losses = []
    for _ in range(40):
        # The cache of autocast is for one step.
        with torch.autocast("cpu", dtype) if outside else nullcontext():
            losses.append(svi.step(**batch) / MILLION)
    assert sum(losses[-5:]) / 5 < losses[0] - 0.1
    assert all(p.isfinite().all() for p in model.parameters())


def test_gradients_at_half_precision_are_those_of_full_precision() -> None:
    torch.set_default_dtype(torch.float32)
    grads = []
    for dtype in (torch.float16, torch.float32):
        pyro.clear_param_store()
        torch.manual_seed(0)
        model = GateLoRA(half_bert(dtype), num_data=MILLION)
        guide = RankDiagonal(model)
        batch = tokens(8)
        torch.manual_seed(1)
        lrvd.RankELBO().loss_and_grads(model, guide, **batch)
        trained = [p for p in (*model.parameters(), guide.log_variance)]
        grads.append(torch.cat([p.grad.flatten() for p in trained if p.requires_grad]))
    half, full = grads
    assert half.dtype is torch.float32 and full.abs().max() > 65504
    assert (half - full).norm() < 0.02 * full.norm()


@SIXTEEN
def test_moments_of_16_bit_parameters_have_32_and_survive_a_restart(
    dtype: torch.dtype,
) -> None:
    torch.set_default_dtype(torch.float32)
    batches = [tokens(8) for _ in range(4)]

    def run(split: int) -> list[Tensor]:
        torch.manual_seed(0)
        model = GateLoRA(half_bert(dtype), num_data=MILLION)
        svi = SVI(model, RankDiagonal(model), lrvd.optim.AdamW(), loss=lrvd.RankELBO())
        for i, batch in enumerate(batches):
            if i == split:
                svi.optim.set_state(svi.optim.get_state())
            if i == split + 1:
                restored = lrvd.optim.AdamW()
                restored.set_state(svi.optim.get_state())
                svi.optim = restored
            svi.step(**batch)
        moments = svi.optim.torch_optim.state.values()
        assert all(m["exp_avg_sq"].dtype is torch.float32 for m in moments)
        assert all(m["exp_avg_sq"].isfinite().all() for m in moments)
        return state(svi)

    assert all(map(torch.equal, run(split=-2), run(split=1)))


def test_a_16_bit_parameter_keeps_its_storage_through_a_step() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.float16))
    view = weight.data
    weight.grad = torch.ones_like(weight)
    pyro.get_param_store()["weight"] = weight
    lrvd.optim.AdamW(variational_lr=0.5)([weight])
    assert torch.equal(view, weight) and weight.dtype is torch.float16
    torch.testing.assert_close(view, torch.full_like(view, 0.5))
    assert weight.grad.dtype is torch.float16


def test_by_torch_float16_takes_the_loss_per_datum_as_check_says() -> None:
    torch.set_default_dtype(torch.float32)
    net = half_bert(torch.float16)
    # A head that lets gradients through, and does not train.
    head = net.base_model.model.classifier.modules_to_save.default.requires_grad_(False)
    with torch.no_grad():
        head.weight *= 20
    model = GateLoRA(net, num_data=MILLION)
    guide, elbo, batch = RankDiagonal(model), lrvd.RankELBO(), tokens(8)
    optim = torch.optim.AdamW(lrvd.optim.parameter_groups(model, guide, lr=1e-2))
    loss = elbo(model, guide)
    loss(**batch).backward()
    with pytest.raises(ValueError, match=r"\(loss\(\*\*batch\) / num_data\).backward"):
        elbo.check()
    optim.zero_grad()
    losses = []
    for _ in range(40):
        per_datum = loss(**batch) / MILLION
        losses.append(float(per_datum.detach()))
        per_datum.backward()
        elbo.check()
        optim.step()
        optim.zero_grad()
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.parametrize("family", [pyro.optim.Adam, pyro.optim.ClippedAdam])
def test_other_optimizers_take_float16_gradients_that_fit(family: Any) -> None:
    torch.set_default_dtype(torch.float32)
    model = GateLoRA(half_bert(torch.float16), num_data=6)
    guide = RankDiagonal(model)
    optim = family({"lr": 1e-4, "eps": 1e-4})
    svi = SVI(model, guide, optim, loss=lrvd.RankELBO(noise="batch"))
    losses = [svi.step(**tokens(6)) for _ in range(3)]
    assert all(map(math.isfinite, losses))
    assert all(p.isfinite().all() for p in model.parameters())

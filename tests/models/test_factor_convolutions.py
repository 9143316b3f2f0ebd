"""`FactorLoRA` on convolutions, from the first step to plain PEFT."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from centered import centered
from nets import components, conv, grouped, lora
from peft import PeftModel
from pruned import outputs, some
from pyro import distributions as dist
from pyro.infer import SVI
from stored import fresh, mean_logits, perturbed, plain_logits, same_predictions
from torch import Tensor, nn
from torch.distributions import kl_divergence
from transformers import ResNetConfig, ResNetForImageClassification

import lrvd_pyro as lrvd
from lrvd_pyro import RankELBO, distributions
from lrvd_pyro.diagnostics.arviz import to_arviz
from lrvd_pyro.guides import TiedDiagonal
from lrvd_pyro.models import FactorLoRA
from lrvd_pyro.predictive.fan_out import looped
from lrvd_pyro.selection.removal import select
from lrvd_pyro.storage.export import export_peft
from lrvd_pyro.storage.folder import load, save

pytestmark = pytest.mark.filterwarnings(nets.GROUPED)
close = torch.testing.assert_close
exactly = partial(close, rtol=0, atol=1e-12)
PAIR: tuple[Any, ...] = ("lora_A", "lora_B")
SIDES = pytest.mark.parametrize("sides", [("lora_A",), PAIR])


class Points(nn.Module):
    """Sequences to logits by a convolution, a point-wise one and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv1d(4, 6, 3)
        self.point = nn.Conv1d(6, 5, 1, stride=2)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(self.point(self.wide(x).tanh()).mean(-1))
        return logits


def points(**config: Any) -> PeftModel:
    return lora(Points(), target_modules=["wide", "point", "out"], **config)


NETS: dict[str, tuple[Callable[..., PeftModel], tuple[int, ...]]] = {
    "plain": (conv, (3, 6, 6)),
    "grouped": (grouped, (4, 6, 6)),
    "points": (points, (4, 9)),
}
KINDS = pytest.mark.parametrize("kind", NETS)


def made(
    kind: str, sides: Any = PAIR, **config: Any
) -> tuple[FactorLoRA, TiedDiagonal, dict[str, Tensor]]:
    build, shape = NETS[kind]
    model = FactorLoRA(build(**config), num_data=60, sides=sides)
    return model, perturbed(model), {"x": torch.randn(4, *shape)}


def resnet() -> Any:
    """A network of the paper's kind: kernels of 7, 3 and 1, and BatchNorm."""
    config = ResNetConfig(
        embedding_size=6, hidden_sizes=[8, 12], depths=[1, 2], num_labels=nets.CLASSES
    )
    net = ResNetForImageClassification(config)
    return net.to(torch.get_default_dtype()).eval()


def test_a_resnet_sees_one_network_per_example() -> None:
    targets = ["convolution"]
    model = FactorLoRA(lora(resnet(), target_modules=targets), num_data=9, sides=PAIR)
    x = torch.randn(3, 3, 32, 32)
    values = model.space.flatten(*PAIR) + 0.2 * torch.randn(3, len(model.draw()))
    together = outputs(model, values, {"pixel_values": x})
    for b, value in enumerate(values):
        with nets.replaced(model.space, value):
            alone = model.base_net(pixel_values=x[b : b + 1]).logits
        close(together[b : b + 1], alone, rtol=1e-9, atol=1e-10)


def fall(driver: str, noise: Any, lr: float) -> float:
    """The loss of a ResNet after 30 steps, as a share of its loss at the start."""
    net = lora(resnet(), target_modules=["convolution"], modules_to_save=["classifier"])
    model = FactorLoRA(net, num_data=12, sides=PAIR)
    guide = TiedDiagonal(model)
    labels = torch.arange(12) % 3
    x = torch.randn(12, 3, 16, 16) + labels.view(-1, 1, 1, 1)
    batch = {"pixel_values": x, "labels": labels}
    elbo = RankELBO(noise=noise, kl_weight=1e-4)
    groups = lrvd.optim.parameter_groups(model, guide, lr=lr)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    svi = SVI(model, guide, lrvd.optim.AdamW(lr=lr), loss=elbo)
    losses = []
    for _ in range(30):
        if driver == "svi":
            losses.append(svi.step(**batch))
            continue
        loss = elbo(model, guide)(**batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return float(sum(losses[-5:]) / sum(losses[:5]))


@pytest.mark.parametrize("driver", ["svi", "torch"])
@pytest.mark.parametrize("noise", ["example", "batch"])
def test_a_resnet_learns_and_does_not_without_steps(driver: str, noise: Any) -> None:
    assert fall(driver, noise, 1e-2) < 0.8 < fall(driver, noise, 0.0)


@KINDS
@SIDES
@pytest.mark.parametrize("noise", ["example", "batch"])
def test_the_kl_counts_every_element_of_a_kernel(
    kind: str, sides: Any, noise: Any
) -> None:
    model, guide, batch = made(kind, sides)
    elbo = RankELBO(noise=noise)
    elbo.loss(model, guide, **batch, labels=torch.tensor([0, 1, 2, 0]))
    scales = torch.exp(0.5 * guide.log_variance.detach())
    expected = sum(
        kl_divergence(dist.Normal(weights, scale), distributions.LogUniform()).sum()
        for side in sides
        for weights, scale in zip(components(model.space, side), scales, strict=True)
    )
    close(elbo.terms["kl"]["factor"], expected)


@KINDS
def test_log_alpha_is_the_noise_over_the_mean_square_of_a_component(kind: str) -> None:
    model, guide, _ = made(kind)
    pairs = zip(*(components(model.space, side) for side in PAIR), strict=True)
    squares = [torch.cat([a.flatten(), b.flatten()]).square().mean() for a, b in pairs]
    expected = guide.log_variance.detach() - torch.stack(squares).log()
    close(guide.log_alpha, expected)
    assert guide.log_alpha.std() > 0.1


@KINDS
@SIDES
def test_a_saved_run_comes_back(kind: str, sides: Any, tmp_path: Path) -> None:
    model, guide, inputs = made(kind, sides)
    if kind != "grouped":
        select(model, guide, keep=some(model.space))
    base = fresh(model.base_net)
    pair = load(save(tmp_path / "run", model, guide), copy.deepcopy(base))
    same_predictions((model, guide), pair, inputs)
    mean = mean_logits(model, guide, inputs)
    exactly(plain_logits(base, tmp_path / "run", inputs), mean)


@KINDS
@SIDES
@pytest.mark.parametrize("mode", ["pruned", "padded"])
def test_plain_peft_gives_the_logits_of_the_mean(
    kind: str, sides: Any, mode: Any, tmp_path: Path
) -> None:
    model, guide, inputs = made(kind, sides)
    if kind != "grouped":
        select(model, guide, keep=some(model.space))
    base = fresh(model.base_net)
    path = export_peft(tmp_path / "out", model, guide, mode=mode, probe=inputs)
    exactly(plain_logits(base, path, inputs), mean_logits(model, guide, inputs))


def test_a_merged_resnet_needs_no_peft(tmp_path: Path) -> None:
    model = FactorLoRA(lora(resnet(), target_modules=["convolution"]), num_data=9)
    guide = perturbed(model)
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    path = export_peft(tmp_path / "out", model, guide, mode="merged", probe=inputs)
    merged = ResNetForImageClassification.from_pretrained(path).eval()
    with torch.no_grad():
        found = merged.to(torch.get_default_dtype())(**inputs).logits
    close(found, mean_logits(model, guide, inputs))


def test_a_convolution_of_which_a_bias_is_left_needs_no_draw() -> None:
    model, guide, inputs = made("plain", lora_bias=True)
    keep = torch.arange(model.space.size) >= 4
    rest = guide.mean().detach() * keep[guide.owner]
    expected = outputs(model, rest, inputs)
    select(model, guide, keep=keep)
    assert list(model.space.constants) == ["first"]
    exactly(mean_logits(model, guide, inputs), expected)
    model.space.close()
    again = FactorLoRA(model.base_net, num_data=60, sides=PAIR)
    exactly(mean_logits(again, TiedDiagonal(again), inputs), expected)


@KINDS
def test_predictions_are_those_of_one_pass_per_draw(kind: str) -> None:
    model, guide, inputs = made(kind)
    found = lrvd.predict(model, guide, [inputs], 5, return_samples=True).samples
    torch.manual_seed(0)
    drawn = [model.value_at(guide()) for _ in range(5)]
    with torch.no_grad():
        close(found, looped(model, drawn, inputs).softmax(-1))


@KINDS
def test_arviz_has_a_place_for_every_weight(kind: str) -> None:
    model, guide, inputs = made(kind)
    batch = {**inputs, "labels": torch.tensor([0, 1, 2, 0])}
    factor = to_arviz(model, guide, [batch], 2)["posterior"]["factor"]
    places = [factor[name].values for name in ("side", "module", "rank")]
    found = list(zip(*(each.tolist() for each in places), strict=True))
    names = [
        (n, i) for n, r in zip(model.space.modules, model.space.ranks) for i in range(r)
    ]
    expected = [
        (side, name, i)
        for side in PAIR
        for (name, i), slot in zip(names, components(model.space, side), strict=True)
        for _ in range(slot.numel())
    ]
    assert found == expected


@KINDS
def test_a_copied_model_draws_its_own_kernels(kind: str) -> None:
    model, _, inputs = made(kind)
    twin = copy.deepcopy(model)
    values = torch.randn(2, 4, len(model.draw()))
    for value in values:
        exactly(outputs(twin, value, inputs), outputs(model, value, inputs))
    with model.bind(values[0]):
        exactly(outputs(twin, values[1], inputs), outputs(model, values[1], inputs))


def test_dora_and_centers_on_convolutions_are_refused() -> None:
    with pytest.raises(TypeError, match="'first' uses DoraConv2dVariant.*plain LoRA"):
        FactorLoRA(conv(use_dora=True), num_data=60)
    net = conv()
    centered(net)
    with pytest.raises(TypeError, match="about a center, which drawn weights do not"):
        FactorLoRA(net, num_data=60)

"""What removed ranks leave behind, on its way through files, PEFT and other models."""

from pathlib import Path
from typing import Any

import nets
import pytest
import runs
import torch
from centered import NETS, centered, exactly, where
from gauges import found, rows, seeded
from nets import bert, perceptron, tokens
from peft import LoraConfig, get_peft_model
from pruned import some
from pyro.infer import SVI
from stored import fresh, learned, mean_logits, plain_logits, same_predictions
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro.gauge import (
    bayesianize,
    center,
)
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.likelihoods.categorical import Categorical
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.rank_space.center import center_at, center_of
from lrvd_pyro.selection.removal import select
from lrvd_pyro.storage.export import merge

pytestmark = pytest.mark.filterwarnings(nets.GROUPED)


MODES: list[Any] = ["pruned", "padded", "merged"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["bert", "gpt2", "rslora, own bias"])
def test_plain_peft_gives_the_logits_of_the_mean(
    kind: str, mode: Any, tmp_path: Path
) -> None:
    """Means that are not 1, some 0, and a module of which a bias alone is left."""
    net, inputs = NETS[kind]()
    model, _ = centered(net)
    guide = learned(model)
    select(model, guide, keep=some(model.space))
    path = lrvd.export_peft(tmp_path / "out", model, guide, mode=mode, probe=inputs)
    if mode != "merged":
        mean = mean_logits(model, guide, inputs)
        exactly(plain_logits(fresh(net), path, inputs), mean)


@pytest.mark.parametrize("kind", ["bert", "rslora, own bias", "ragged", "convolutions"])
def test_a_centered_posterior_comes_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    net, inputs = NETS[kind]()
    model, _ = centered(net)
    guide = learned(model)
    select(model, guide, keep=some(model.space))
    path = lrvd.save(tmp_path / "run", model, guide)
    pair = lrvd.load(path, fresh(net))
    same_predictions((model, guide), pair, inputs)
    assert list(pair[0].space.constants) == list(model.space.constants)
    mean = mean_logits(model, guide, inputs)
    assert torch.equal(mean_logits(*pair, inputs), mean)
    exactly(plain_logits(fresh(net), path, inputs), mean)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("driver", runs.DRIVERS)
def test_a_killed_run_goes_on_with_centers_and_biases(
    driver: str, bias: bool, tmp_path: Path
) -> None:
    def begun(*, about_a_center: bool = False) -> dict[str, Any]:
        torch.manual_seed(0)
        model = GateLoRA(perceptron(lora_bias=bias), num_data=60)
        if about_a_center:
            center_at(model.space, torch.randn(model.space.size))
        guide = RankDiagonal(model)
        optim: Any = lrvd.optim.AdamW(lr=1e-2)
        if driver == "torch":
            optim = torch.optim.AdamW(lrvd.optim.parameter_groups(model, guide))
        parts = {"model": model, "guide": guide, "optimizer": optim}
        return {**parts, "elbo": lrvd.RankELBO()}

    def step(run: dict[str, Any]) -> str:
        torch.manual_seed(1)
        batch = rows(8, 5) | {"labels": torch.arange(8) % 3}
        runs.step({**run, "schedule": []}, **batch)
        return runs.bits([*run["model"].state_dict().values()])

    run = begun(about_a_center=True)
    step(run)
    select(run["model"], run["guide"], run["optimizer"], keep=some(run["model"].space))
    path = tmp_path / "run.safetensors"
    lrvd.checkpoint(path, **run)
    expected = [step(run), step(run)]
    again = begun()
    frozen = again["model"].base_net.get_base_model().out.base_layer.bias
    before, frozen.data = frozen.data, frozen.data + 1
    with pytest.raises(ValueError, match="another base"):
        lrvd.resume(path, **again)
    assert not center_of(again["model"].space)
    frozen.data = before
    lrvd.resume(path, **again)
    assert [step(again), step(again)] == expected


def test_center_and_bias_stay_frozen_whatever_peft_switches() -> None:
    net = bert()
    model, _ = centered(net)
    guide = RankDiagonal(model)
    select(model, guide, keep=torch.tensor(model.space.coordinates["layer"]) == 1)
    named = [name for name, _ in net.named_parameters()]
    with net.disable_adapter():
        net(**tokens())
    net.set_adapter("default")
    assert not any("bias" in name and "lora" in name for name in named)
    assert not any("layer.0" in name and "lora" in name for name in named)
    frozen = {n: b.clone() for n, b in net.named_buffers() if "lora" in n}
    svi = SVI(model, guide, lrvd.optim.AdamW(lr=1e-2), loss=lrvd.RankELBO())
    svi.step(**tokens())
    assert frozen
    assert all(torch.equal(b, frozen[n]) for n, b in net.named_buffers() if n in frozen)


def test_a_center_belongs_to_the_adapter_until_it_is_taken_away() -> None:
    config = LoraConfig(r=4, target_modules=["hidden", "out"])
    net = get_peft_model(nets.Perceptron(), config)
    model, point = centered(net)
    model.space.close()
    again = GateLoRA(net, num_data=60)
    exactly(where(again), point)
    with pytest.raises(TypeError, match="about a center, which drawn weights"):
        FactorLoRA(net, num_data=60)
    center(again, None)
    FactorLoRA(net, num_data=60)
    assert not net.peft_config["default"].lora_bias
    assert not config.lora_bias and not any(
        m.lora_bias["default"] for m in again.space.layers
    )


@pytest.mark.parametrize("left", [1, 15])
def test_biases_of_0_beside_others_are_kept_and_come_back(
    left: int, tmp_path: Path
) -> None:
    net, inputs = bert(), tokens(4, labels=False)
    model, _ = centered(net)
    guide = learned(model)
    select(model, guide, keep=torch.arange(16) < left)
    center(model, None)
    pair = lrvd.load(lrvd.save(tmp_path / "run", model, guide), fresh(net))
    same_predictions((model, guide), pair, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_constants_come_back_in_half_precision(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    net, inputs = bert().to(dtype), tokens(4, labels=False)
    model, _ = centered(net)
    guide = learned(model)
    select(model, guide, keep=some(model.space))
    path = lrvd.save(tmp_path / "run", model, guide)
    pair = lrvd.load(path, fresh(net).to(dtype))
    same_predictions((model, guide), pair, inputs)


def test_files_of_pefts_own_have_what_freed_layers_leave(tmp_path: Path) -> None:
    net, inputs = bert(), tokens(4, labels=False)
    model, _ = centered(net)
    layer = torch.tensor(model.space.coordinates["layer"])
    select(model, RankDiagonal(model), keep=layer == 1)
    with pytest.warns(UserWarning, match="have invalid shape"):  # PEFT of any bias
        net.save_pretrained(str(tmp_path / "run"))
    with pytest.warns(UserWarning, match="missing adapter keys"):  # of the zeros
        plain = plain_logits(fresh(net), tmp_path / "run", inputs)
    exactly(plain, net.eval()(**inputs).logits)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_pass_that_fails_leaves_the_center_that_was(passes: int) -> None:
    class Interrupted(list[Any]):
        left = passes

        def __iter__(self) -> Any:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return super().__iter__()

    net = perceptron()
    if passes == 1:
        centered(net)
    with pytest.raises(KeyboardInterrupt):
        bayesianize(
            net,
            Interrupted([rows(9, 5)]),
            likelihood=Categorical(),
            num_data=9,
            centered=True,
        )
    found = center_of(lrvd.RankSpace(net))
    assert bool(found) is (passes == 1)


class NoBias(torch.nn.Module):
    """A convolution with a bias, and a linear layer without."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 6, 3, padding=1)
        self.second = torch.nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh().mean((-2, -1)))


def test_merging_takes_a_bias_where_the_layer_has_one() -> None:
    net = nets.lora(NoBias(), target_modules=["first", "second"])
    net.get_base_model().save_pretrained = None  # what is merged is a Transformers net
    model, _ = centered(net)
    guide, inputs = RankDiagonal(model), {"x": torch.randn(4, 3, 6, 6)}
    exactly(merge(model, guide)(**inputs), mean_logits(model, guide, inputs))
    keep = torch.arange(8) >= 4  # a bias alone is left of the convolution
    select(model, guide, keep=keep)
    exactly(merge(model, guide)(**inputs), mean_logits(model, guide, inputs))
    select(model, guide, keep=torch.tensor([False, True, True, True]))
    with pytest.raises(
        ValueError, match="bias in 'second', whose layer has none.*prune"
    ):
        merge(model, guide)


def test_a_trained_lora_becomes_a_centered_posterior(tmp_path: Path) -> None:
    net, batch = bert(), tokens(32)
    inputs = {name: v for name, v in batch.items() if name != "labels"}
    before = net.eval()(**batch).logits.detach()
    model, guide = bayesianize(
        net, [batch], likelihood=Categorical(), centered=True, generator=seeded()
    )
    with lrvd.posterior_mean(model, guide) as mean:
        torch.testing.assert_close(mean(**batch).logits, before)
    means = torch.cat([*found(net, [batch]).means.values()])
    torch.testing.assert_close(where(model), means, rtol=1e-6, atol=1e-8)
    lrvd.prune(model, guide, log_alpha_threshold=float(guide.log_alpha.median()))
    lrvd.export_peft(tmp_path / "small", model, guide, probe=inputs)
    again, _ = bayesianize(net, [batch], likelihood=Categorical())
    assert not center_of(again.space)

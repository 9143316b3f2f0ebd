"""LoRA modules that forward passes leave out: dropped, routed around, or for good."""

import math
from typing import Any

import nets
import pytest
import torch
from nets import hooks
from peft import LoraConfig, get_peft_model
from pyro.infer import SVI
from torch import Tensor, nn
from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

from lrvd_pyro import RankELBO, RankSpace, predict
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.optim import AdamW

CAUSES = "layerdrop.*router.*target_modules"


class Idle(nn.Module):
    """A layer that runs, and one that never does."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.idle = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x)


class Fused(nets.Perceptron):
    """Computes by the layers' weights and calls no layer, as fused LoRA kernels do."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fused(self.out, self.fused(self.hidden, x).tanh())

    def fused(self, layer: Any, x: Tensor) -> Tensor:
        if not hasattr(layer, "lora_A"):
            return layer(x)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        y = nn.functional.linear(x, layer.weight, layer.base_layer.bias)
        return y + layer.scaling["default"] * (x @ A.T) @ B.T


class Experts(nn.Module):
    """Each row goes to one of four experts, by the sign of two of its entries."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(5, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        which = (x[:, :2] > 0).long() @ torch.tensor([1, 2])
        y = x.new_zeros(len(x), 3)
        for i, expert in enumerate(self.experts):
            if (rows := which == i).any():
                y = y.index_put((rows,), expert(x[rows]))
        return y


class Dropped(nn.Module):
    """Three residual layers; in training each is left out at a rate."""

    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.rate, self.layers = rate, nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            dropped = torch.rand(()) < self.rate  # in either mode, as Wav2Vec2 does
            if not (self.training and dropped):
                x = x + layer(x).tanh()
        return x


class Towers(nn.Module):
    """A tower for words, and one for pictures that only some batches have."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.ModuleDict({"embed": nn.Linear(5, 3)})
        self.pictures = nets.Perceptron()

    def forward(self, x: Tensor, pixels: Tensor | None = None) -> Tensor:
        y = self.words["embed"](x)
        return y if pixels is None else y + self.pictures(pixels)


class FusedPart(nn.Module):
    """A part that runs, whose layers fused kernels compute."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.part = nn.Linear(5, 5), Fused()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.embed(x))


def model_of(net: nn.Module, *targets: str) -> GateLoRA:
    return GateLoRA(nets.lora(net, target_modules=list(targets)), num_data=40)


def steps(model: GateLoRA, x: Tensor, classes: int, count: int) -> list[float]:
    guide = RankDiagonal(model)
    svi = SVI(model, guide, AdamW(lr=1e-3), loss=RankELBO(noise="batch"))
    labels = torch.randint(0, classes, (len(x),))
    return [svi.step(x=x, labels=labels) for _ in range(count)]


def wav2vec2(layerdrop: float) -> Any:
    config = Wav2Vec2Config(
        vocab_size=16,
        hidden_size=16,
        num_hidden_layers=6,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_stride=(4, 4),
        conv_kernel=(8, 4),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        num_labels=2,
        mask_time_prob=0.0,
        layerdrop=layerdrop,
    )
    net = Wav2Vec2ForSequenceClassification(config).to(torch.get_default_dtype())
    return get_peft_model(net, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.filterwarnings("ignore:the network trains with dropout")
def test_wav2vec2_trains_under_layerdrop(seed: int) -> None:
    """The warning of the first step names layerdrop too."""
    net = wav2vec2(0.5).train()
    torch.manual_seed(seed)
    model = GateLoRA(net, num_data=4)
    batch = {"input_values": torch.randn(4, 200), "labels": torch.tensor([0, 1, 0, 1])}
    svi = SVI(model, RankDiagonal(model), AdamW(lr=1e-3), loss=RankELBO())
    with pytest.warns(UserWarning, match="no gradient for .*layerdrop.* later steps"):
        assert math.isfinite(svi.step(**batch))
    assert all(math.isfinite(svi.step(**batch)) for _ in range(2))
    assert net.training and not model.space.binding.unreached()


def test_layers_that_training_drops_are_shown_by_one_pass_in_eval_mode() -> None:
    """Even if the first pass drops every layer; the random state goes on as it was."""
    model = model_of(Dropped(1.0), "0", "1", "2")
    calls: list[bool] = []
    model.base_net.register_forward_pre_hook(lambda m, *_: calls.append(m.training))
    state = torch.get_rng_state()
    for _ in range(3):
        model.predictions(x=torch.ones(4, 5))
    assert calls == [True, False, True, True]
    assert not model.space.binding.unreached()
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    for _ in range(3):
        model.base_net(torch.ones(4, 5))
    assert torch.equal(torch.get_rng_state(), after)


def test_dropped_layers_without_a_model_are_judged_over_several_passes() -> None:
    space = RankSpace(nets.lora(Dropped(), target_modules=["0", "1", "2"]).train())
    for _ in range(40):
        with space.bind(torch.ones(space.size)):
            space.net(torch.ones(4, 5))
    assert not space.binding.unreached()
    never = RankSpace(nets.lora(Dropped(), target_modules=["0", "1", "2"]).train())
    never.net.base_model.model.layers[1] = nn.Identity()
    with pytest.raises(RuntimeError, match="32 forward passes.*" + CAUSES):
        for _ in range(40):
            with never.bind(torch.ones(never.size)):
                never.net(torch.ones(4, 5))


@pytest.mark.parametrize("training", [True, False])
def test_experts_that_get_no_token_at_first_are_waited_for(training: bool) -> None:
    model = model_of(Experts(), "0", "1", "2", "3")
    model.base_net.train(training)
    with torch.no_grad():
        for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            model(x=torch.rand(6, 5) * torch.tensor([*signs, 1, 1, 1]))
            model(x=torch.rand(6, 5) * torch.tensor([*signs, 1, 1, 1]))
    assert not model.space.binding.unreached()


def test_an_expert_that_never_gets_a_token_is_named_after_32_passes() -> None:
    model = model_of(Experts(), "0", "1", "2", "3")
    model.base_net.eval()
    for _ in range(31):
        model.predictions(x=torch.rand(6, 5))
    with pytest.raises(
        RuntimeError, match=r"in 32 forward .*\['experts.0'.*router.*leave rarely used"
    ):
        model.predictions(x=torch.rand(6, 5))


@pytest.mark.parametrize("training", [True, False])
def test_a_tower_that_the_first_batches_skip_is_waited_for(training: bool) -> None:
    model = model_of(Towers(), "embed", "hidden", "out")
    model.base_net.train(training)
    words, pixels = torch.randn(4, 5), torch.randn(4, 5)
    state = torch.get_rng_state()
    told = "did not run the parts around 2 LoRA modules: pictures.hidden, pictures.out"
    with pytest.warns(UserWarning, match=told):
        model.predictions(x=words)
    for _ in range(4):
        model.predictions(x=words)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.space.binding.unreached() == ["pictures.hidden", "pictures.out"]
    model.predictions(x=words, pixels=pixels)
    assert not model.space.binding.unreached()
    assert hooks(model.base_net) == 3  # those that looked at the towers are gone


@pytest.mark.filterwarnings("ignore:the first batch did not run:UserWarning")
def test_a_tower_that_no_batch_reaches_is_named_after_32_passes() -> None:
    model = model_of(Towers(), "embed", "hidden", "out")
    with torch.no_grad():  # a trained network may predict for words alone
        for _ in range(40):
            model.predictions(x=torch.randn(4, 5))
    for _ in range(31):
        model.predictions(x=torch.randn(4, 5))
    with pytest.raises(RuntimeError, match=r"in 72 forward .*\['pictures.hidden'"):
        model.predictions(x=torch.randn(4, 5))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_fused_kernels_in_a_part_that_runs_are_named_at_once(
    training: bool, compiled: bool
) -> None:
    model = model_of(FusedPart(), "embed", "hidden", "out")
    model.base_net.train(training)
    if compiled:
        model.base_net.compile(backend="eager")
    with pytest.raises(RuntimeError, match=r"in 1 forward .*\['part.hidden'"):
        model.predictions(x=torch.randn(4, 5))


class ByMethod(FusedPart):
    """Calls a method of the part, so that nothing tells that the part runs."""

    def forward(self, x: Tensor) -> Tensor:
        return self.part.forward(self.embed(x))


def test_a_part_that_only_methods_enter_is_told_of() -> None:
    model = model_of(ByMethod(), "embed", "hidden", "out").eval()
    with pytest.warns(
        UserWarning, match="part.hidden.*fused kernels or methods.*never"
    ):
        predict(model, RankDiagonal(model), [{"x": torch.randn(4, 5)}])


def test_a_second_look_leaves_buffers_as_they_were() -> None:
    class Counting(Towers):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor, pixels: Tensor | None = None) -> Tensor:
            self.count += 1
            return super().forward(x, pixels)

    model = model_of(Counting(), "embed", "hidden", "out")
    with pytest.warns(UserWarning, match="did not run the parts"):
        model.predictions(x=torch.randn(4, 5))
    assert model.base_net.get_base_model().count == 1


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_that_the_network_never_calls_is_named_at_once(training: bool) -> None:
    model = model_of(Idle(), "hidden", "idle")
    model.base_net.train(training)
    with pytest.raises(
        RuntimeError, match=r"in 1 forward .* never reached .*\['idle'\].*leave them o"
    ):
        model(x=torch.randn(4, 5))
    assert model.base_net.training is training


def test_without_a_model_it_is_named_at_once_in_eval_mode() -> None:
    space = RankSpace(nets.lora(Idle(), target_modules=["hidden", "idle"]).eval())
    with pytest.raises(RuntimeError, match=r"never reached .*\['idle'\].*leave them"):
        with space.bind(torch.ones(space.size)):
            space.net(torch.randn(2, 5))


@pytest.mark.parametrize("training", [True, False])
def test_fused_kernels_are_named_at_the_first_pass(training: bool) -> None:
    model = model_of(Fused(), "hidden", "out")
    model.base_net.train(training)
    message = r"\['hidden', 'out'\].*fused LoRA kernels.*Unsloth.*lora_qkv_kernel.*off"
    with pytest.raises(RuntimeError, match=message):
        if training:
            steps(model, torch.randn(4, 5), 3, 1)
        else:
            predict(model, RankDiagonal(model), [{"x": torch.randn(4, 5)}])


def test_the_fused_twin_is_that_network() -> None:
    """What `Fused` computes is the LoRA itself: only the hooks tell them apart."""
    torch.manual_seed(0)
    fused = nets.lora(Fused(), target_modules=["hidden", "out"])
    plain = nets.perceptron()
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(4, 5)
    torch.testing.assert_close(fused(x), plain(x))
    assert hooks(fused) == 0


def test_a_later_pass_may_leave_modules_out() -> None:
    net = nets.perceptron()
    space = RankSpace(net)
    with space.bind(torch.ones(space.size)):
        net(torch.randn(2, 5))
    with space.bind(torch.ones(space.size)):
        net.get_submodule("base_model.model.hidden")(torch.randn(2, 5))

"""Adapters that ``net.add_adapter`` or PEFT's injection made, without a PeftModel."""

from collections.abc import Callable
from typing import Any

import nets
import pytest
import torch
from nets import refused, tokens
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from pyro.infer import SVI
from torch import Tensor, nn

import lrvd_pyro as lrvd
from lrvd_pyro import RankELBO, RankSpace, predict
from lrvd_pyro.gauge import bayesianize
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.likelihoods import Categorical
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.optim import AdamW
from lrvd_pyro.selection.removal import select

exactly = torch.testing.assert_close


def config(**options: Any) -> LoraConfig:
    given: dict[str, Any] = {"target_modules": ["query", "value"]} | options
    return LoraConfig(r=4, lora_alpha=8, modules_to_save=["classifier"], **given)


def base() -> Any:
    net = nets.BertForSequenceClassification(nets.bert_config())
    return net.to(torch.get_default_dtype())


def filled(net: nn.Module) -> Any:
    """B differs from zero."""
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return net


def added(**options: Any) -> Any:
    net = base()
    net.add_adapter(config(**options))
    return filled(net)


def injected(**options: Any) -> Any:
    return filled(inject_adapter_in_model(config(**options), base()))


def wrapped(net: Any) -> Any:
    """The same network and adapter as a PeftModel."""
    torch.manual_seed(0)
    peft = get_peft_model(base(), config())
    prefix = "base_model.model."
    peft.load_state_dict({prefix + n: t for n, t in net.state_dict().items()})
    return peft


KINDS: dict[str, Callable[..., Any]] = {"add_adapter": added, "inject": injected}


@pytest.mark.parametrize("kind", KINDS)
def test_a_space_on_it_is_that_of_a_peft_model(kind: str) -> None:
    net, batch = KINDS[kind]().eval(), tokens(4, labels=False)
    twin = wrapped(net).eval()
    ours, theirs = RankSpace(net), RankSpace(twin)
    assert ours.modules == theirs.modules and ours.adapter == "default"
    gate = torch.rand(4, ours.size)
    with ours.bind(gate), theirs.bind(gate):
        exactly(net(**batch).logits, twin(**batch).logits)
    with ours.bind(torch.zeros(ours.size)):
        off = net(**batch).logits
    assert (off - net(**batch).logits).abs().max() > 1e-6


@pytest.mark.parametrize("family", [GateLoRA, FactorLoRA])
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_and_predicts_as_the_peft_model_does(kind: str, family: Any) -> None:
    net, batch = KINDS[kind](), tokens(6)
    inputs = {name: t for name, t in batch.items() if name != "labels"}
    found: list[tuple[list[float], Tensor]] = []
    for each in (net, wrapped(net)):
        model = family(each, num_data=60)
        guide = RankDiagonal(model) if family is GateLoRA else None
        guide = guide or lrvd.guides.TiedDiagonal(model)
        svi = SVI(model, guide, AdamW(lr=1e-2), loss=RankELBO())
        torch.manual_seed(1)
        losses = [svi.step(**batch) for _ in range(3)]
        probs = predict(model, guide, [inputs], num_samples=4).probs
        found.append((losses, probs))
        frozen = model.base_net.get_parameter(
            next(n for n, _ in each.named_parameters() if "base_layer" in n)
        )
        assert not frozen.requires_grad
    assert found[0][0] == pytest.approx(found[1][0])
    exactly(found[0][1], found[1][1])


def test_it_is_pruned_and_bayesianized_and_linearized() -> None:
    net, batch = added(), tokens(12)
    inputs = {name: t for name, t in batch.items() if name != "labels"}
    model, guide = bayesianize(net, [batch], likelihood=Categorical(), centered=True)
    assert predict(model, guide, [inputs], method="linearized").probs.isfinite().all()
    select(model, guide, keep=torch.arange(16) >= 6)
    assert model.space.size == 10 and len(model.space.constants) == 1
    assert predict(model, guide, [inputs], num_samples=2).probs.isfinite().all()


# PEFT's own, whenever a network gets a second adapter by add_adapter
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_of_two_adapters_the_active_one_is_taken_or_one_is_named() -> None:
    net, lora = base(), LoraConfig(r=2, target_modules=["query"])
    net.add_adapter(lora)
    net.add_adapter(lora, "second")
    assert RankSpace(net).adapter == "second"
    net.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"\['default', 'second'\] are active; exp"):
        RankSpace(net)
    with pytest.raises(ValueError, match=r"'third' is unknown; .*\['default', 'sec"):
        RankSpace(net, "third")
    net.set_adapter("default")
    refused(RankSpace(net, "second"), r"'second' is not active.*net.set_adapter")


def test_disabled_adapters_are_refused_with_the_call_that_enables_them() -> None:
    net = added()
    space = RankSpace(net)
    net.disable_adapters()
    refused(space, r"'default' is disabled in .*call net.enable_adapters\(\)")
    net.enable_adapters()
    with space.bind(torch.ones(space.size)):
        net(**tokens(2, labels=False))


def test_a_network_without_lora_is_refused_with_both_ways() -> None:
    message = r"expected a PEFT model.*: get_peft_model\(.* or net.add_adapter\(Lora"
    for net in (base(), nets.Perceptron(), inject_adapter_in_model(ia3(), base())):
        with pytest.raises(TypeError, match=message):
            GateLoRA(net, num_data=10)


def ia3() -> Any:
    from peft import IA3Config

    return IA3Config(target_modules=["query"], feedforward_modules=[])

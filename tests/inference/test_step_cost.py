"""What a step costs beyond plain LoRA, in things that can be counted."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pyro
import pytest
import torch
from pairs import rank_guide
from peft import PeftModel
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertForSequenceClassification

from lrvd_pyro import RankELBO, priors
from lrvd_pyro.inference.kl import latent_sites
from lrvd_pyro.likelihoods.categorical import Categorical
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.optim import AdamW, parameter_groups

SIX = ["query", "key", "value", "dense"]  # and the pooler's, outside the layers
MODULES = 6  # of a layer
READS_DEVICE = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "_unique2",
    "repeat_interleave",
}
COPIES_TO_CPU = ("cpu", "numpy", "tolist")
Step = Callable[[], Any]
Family = Callable[[PeftModel], Any]


class Operations(TorchDispatchMode):
    """Counts the operations that torch carries out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        if func is torch.ops.aten.index.Tensor:
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            self.counts["nonzero"] += len(masks)
        return func(*args, **(kwargs or {}))


def net_of(layers: int) -> PeftModel:
    """Width 64, rank 2: for a token, what LoRA keeps of a layer is about 1,000."""
    config = nets.bert_config()
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": layers}
    config.update(sizes)
    config.max_position_embeddings = 64
    net = BertForSequenceClassification(config).to(torch.get_default_dtype())
    return nets.lora(net, r=2, target_modules=SIX, task_type="SEQ_CLS")


def gate(net: PeftModel) -> GateLoRA:
    return GateLoRA(net, num_data=60)


def factor(net: PeftModel) -> FactorLoRA:
    return FactorLoRA(net, num_data=60)


def horseshoe(net: PeftModel) -> GateLoRA:
    weights, prior = dist.Normal(0.0, 1.0), priors.Horseshoe()
    return GateLoRA(net, num_data=60, prior=prior, weight_prior=weights)


FAMILIES = pytest.mark.parametrize("family", [gate, factor, horseshoe])
# Operations that SVI adds to LoRA: for each module, and once for the step.
LIMITS = {gate: (8, 210), factor: (19, 230), horseshoe: (26, 700)}


def lora_step(net: PeftModel, batch: dict[str, Tensor]) -> Step:
    trained = [p for p in net.parameters() if p.requires_grad]
    optim = torch.optim.AdamW(trained, fused=True)

    def step() -> None:
        net(**batch).loss.backward()
        optim.step()
        optim.zero_grad()

    return step


def torch_step(model: Any, batch: dict[str, Tensor]) -> Step:
    guide = rank_guide(model)
    loss = RankELBO()(model, guide)
    optim = torch.optim.AdamW(parameter_groups(model, guide), fused=True)

    def step() -> None:
        loss(**batch).backward()
        optim.step()
        optim.zero_grad()

    return step


def svi_step(model: Any, batch: dict[str, Tensor]) -> Step:
    svi = SVI(model, rank_guide(model), AdamW(), loss=RankELBO())
    return lambda: svi.step(**batch)


def operations(step: Step) -> Counter[str]:
    """The operations of one step after the first, Pyro's validation off."""
    with pyro.validation_enabled(False):
        step()
        with Operations() as seen:
            step()
    return seen.counts


def readings(step: Step) -> int:
    """How often a step waits for a value from the device."""
    copies: Counter[str] = Counter()

    def counted(name: str, copy: Callable[..., Any]) -> Callable[..., Any]:
        def method(*args: Any, **kwargs: Any) -> Any:
            copies[name] += 1
            return copy(*args, **kwargs)

        return method

    with pyro.validation_enabled(False), pytest.MonkeyPatch.context() as patch:
        step()
        for name in COPIES_TO_CPU:
            patch.setattr(Tensor, name, counted(name, getattr(Tensor, name)))
        with Operations() as seen:
            step()
    read = sum(n for name, n in seen.counts.items() if name in READS_DEVICE)
    return read + copies.total()


@FAMILIES
def test_the_torch_driver_never_waits_for_the_device_and_svi_once(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On the CPU, Categorical reads the labels whatever the validation.
    monkeypatch.setattr(Categorical, "_check", lambda *args: None)
    batch = nets.tokens()
    plain = readings(lora_step(net_of(1), batch))
    assert readings(torch_step(family(net_of(1)), batch)) == plain
    assert readings(svi_step(family(net_of(1)), batch)) == plain + 1


@pytest.mark.parametrize(
    ("read", "times"),
    [
        (lambda x: x[0].item(), 1),
        (lambda x: bool(x[0] > 0), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.numpy(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.unique(), 1),
        (lambda x: x.repeat_interleave(torch.tensor([1, 2])), 1),
        (lambda x: x[torch.tensor([1])] + 1, 0),
    ],
)
def test_readings_are_found(read: Callable[[Tensor], Any], times: int) -> None:
    assert readings(lambda: read(torch.tensor([2.0, 3.0]))) == times


@FAMILIES
def test_sites_do_not_grow_with_the_modules(family: Family) -> None:
    counts = []
    for layers in (1, 3):
        model, batch = family(net_of(layers)), nets.tokens()
        drawn = poutine.trace(rank_guide(model)).get_trace(**batch)
        run = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(**batch)
        nodes: list[Any] = [*drawn.nodes.values(), *run.nodes.values()]
        counts.append(sum(site["type"] == "sample" for site in nodes))
        assert len(latent_sites(run)) == (3 if family is horseshoe else 1)
    assert counts[0] == counts[1]


def extra(family: Family, layers: int, driver: Any) -> int:
    """The operations that a step adds to LoRA's."""
    batch = nets.tokens()
    plain = operations(lora_step(net_of(layers), batch)).total()
    return operations(driver(family(net_of(layers)), batch)).total() - plain


@FAMILIES
def test_each_module_adds_the_same_few_operations(family: Any) -> None:
    one, two, three = (extra(family, layers, svi_step) for layers in (1, 2, 3))
    assert three - two == two - one
    of_module, of_step = LIMITS[family]
    assert (two - one) / MODULES <= of_module
    assert one - (two - one) <= of_step
    assert extra(family, 1, torch_step) < one


@pytest.mark.parametrize("family", [gate, horseshoe])
def test_the_backward_pass_keeps_two_per_cent_more_than_loras(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    from benchmarks.measuring import bytes_kept

    batch = nets.tokens(16, length=64)
    net, model = net_of(2), family(net_of(2))
    plain = bytes_kept(lambda: net(**batch).loss, net)
    loss = RankELBO()(model, rank_guide(model))
    loss(**batch)
    kept = bytes_kept(lambda: loss(**batch), model)
    assert plain < kept <= 1.02 * plain


@pytest.mark.parametrize("per_example", [False, True])
def test_a_draw_breaks_no_graph(per_example: bool) -> None:
    torch._dynamo.reset()
    model, batch = gate(net_of(1)), nets.tokens(labels=False)
    draw = torch.rand(*[6] * per_example, model.space.size)
    with model.bind(draw), torch.no_grad():
        found = torch._dynamo.explain(model.base_net)(**batch)
    torch._dynamo.reset()
    assert found.graph_break_count == 0 and found.graph_count == 1

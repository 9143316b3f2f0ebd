"""The private parts of other libraries exist, and mean what `_compat` says."""

import copy
import threading
from pathlib import Path
from typing import Any

import bases
import pyro
import pytest
import torch
from nets import bert, perceptron, tokens
from peft import LoraConfig
from peft import helpers as peft_helpers
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.nn import PyroModule
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel
from transformers.utils import logging

from lrvd_pyro._compat import peft, transformers
from lrvd_pyro._compat import pyro as compat_pyro
from lrvd_pyro._compat import torch as compat_torch

SEEN: list[bool] = []
NUMBERS: list[int] = []


class Probe(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        SEEN.append(compat_torch.in_backward())
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        SEEN.append(compat_torch.in_backward())
        return grad


def test_torch_says_when_a_backward_pass_runs() -> None:
    SEEN.clear()
    Probe.apply(torch.ones(1, requires_grad=True)).sum().backward()
    assert SEEN == [False, True], "torch._C._current_graph_task_id has changed"


class Numbered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        NUMBERS.append(compat_torch.next_node())
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        NUMBERS.append(compat_torch.evaluated_node())
        return grad


def test_torch_numbers_its_nodes_and_says_which_one_it_evaluates() -> None:
    NUMBERS.clear()
    assert compat_torch.evaluated_node() == -1
    first = compat_torch.next_node()
    Numbered.apply(torch.ones(1, requires_grad=True)).sum().backward()
    changed = "torch._C._autograd._get_sequence_nr or _current_autograd_node changed"
    assert NUMBERS == [first + 1, first], changed
    assert compat_torch.next_node() > first


def test_torch_marks_a_compiled_module() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    assert not compat_torch.is_compiled(net)
    net[0].compile(backend="eager")
    assert compat_torch.is_compiled(net), "nn.Module._compiled_call_impl has changed"


def test_torch_keeps_the_original_within_a_compiled_network() -> None:
    net = nn.Linear(2, 2)
    compiled: Any = torch.compile(net, backend="eager")
    assert compat_torch.compiled_original(compiled) is net, "_orig_mod has changed"
    assert compat_torch.compiled_original(net) is None


def test_pyro_names_the_modules_of_a_tree() -> None:
    root, child = PyroModule("root"), PyroModule()
    assert not compat_pyro.name_in_tree(child) and not compat_pyro.name_in_tree(3)
    root.child = child
    assert compat_pyro.name_in_tree(child) == "root.child", "_pyro_name has changed"


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_torch_convolves_in_a_method_of_its_own(kind: Any) -> None:
    class Doubled(kind):  # type: ignore[misc]
        def _conv_forward(self, *args: Any) -> Any:
            return 2 * super()._conv_forward(*args)

    torch.manual_seed(0)
    plain, doubled = kind(1, 1, 1, bias=False), Doubled(1, 1, 1, bias=False)
    doubled.load_state_dict(plain.state_dict())
    x = torch.randn(1, *plain.weight.shape[1:])
    assert torch.equal(doubled(x), 2 * plain(x)), "_conv_forward has changed"
    assert compat_torch.convolves(plain) and not compat_torch.convolves(doubled)
    assert not compat_torch.convolves(kind(1, 1, 1, padding_mode="circular"))
    assert not compat_torch.convolves(nn.Linear(1, 1))


def test_torch_keeps_hooks_in_two_dicts() -> None:
    layer = nn.Linear(2, 2)
    layer.register_forward_pre_hook(lambda *_: None)
    layer.register_forward_hook(lambda *_: None)
    before, after = compat_torch.forward_hooks(layer)
    assert len(before) == len(after) == 1, "nn.Module._forward_hooks has changed"
    before.clear()
    assert not compat_torch.forward_hooks(copy.deepcopy(layer))[0]


def test_torch_tells_persistent_buffers() -> None:
    layer = nn.Module()
    layer.register_buffer("kept", torch.ones(1))
    layer.register_buffer("left", torch.ones(1), persistent=False)
    found = dict(compat_torch.persistent_buffers(layer))
    assert [*found] == ["kept"], "nn.Module._non_persistent_buffers_set has changed"
    assert found.keys() == layer.state_dict().keys()


def test_torch_changes_lists_of_tensors_in_place() -> None:
    tensors = [torch.ones(2), torch.ones(3, dtype=torch.float64)]
    compat_torch.multiply_each(tensors, 3.0)
    compat_torch.add_each(tensors, [torch.ones(2).half(), torch.ones(3)])
    assert [t.tolist() for t in tensors] == [[4.0] * 2, [4.0] * 3]


def test_peft_caches_dora_norms_inside_its_helper_alone() -> None:
    assert not peft.caches_dora_norms()
    with peft_helpers.DoraCaching():
        assert peft.caches_dora_norms(), "dora.ENABLE_DORA_CACHING has changed"


def test_peft_activates_no_other_adapter_where_one_is_deleted() -> None:
    net = perceptron()
    net.add_adapter("second", net.peft_config["default"])
    layer: Any = net.base_model.model.hidden
    peft.delete_from_layer(layer, "default")
    assert "default" not in layer.lora_A and "second" in layer.lora_A
    assert layer.active_adapters == ["default"], "LoraLayer._active_adapter has changed"


@pytest.mark.parametrize("merge", [(), ("default",)])
def test_peft_unloads_a_network_that_add_adapter_adapted(merge: Any) -> None:
    """With a token adapter, which holds a layer of PEFT. The trained head stays."""
    net: Any = copy.deepcopy(bert()).unload()
    before = copy.deepcopy(net)
    options = {"target_modules": ["query"], "modules_to_save": ["classifier"]}
    config = LoraConfig(**options, trainable_token_indices=[3, 4])
    net.add_adapter(config)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    batch = tokens(labels=False)
    adapted = net.eval()(**batch).logits
    head = net.classifier.modules_to_save["default"].state_dict()
    before.classifier.load_state_dict(head)
    plain = peft.unloaded(net, merge)
    assert plain is net and type(plain.classifier) is nn.Linear
    assert plain.state_dict().keys() == before.state_dict().keys()
    found, expected = plain(**batch).logits, before.eval()(**batch).logits
    torch.testing.assert_close(found, adapted if merge else expected)
    assert (adapted - expected).abs().max() > 1e-3


def test_transformers_saves_a_network_whole_that_forgot_its_adapters(
    tmp_path: Path,
) -> None:
    net: Any = copy.deepcopy(bert()).unload()
    net.add_adapter(LoraConfig(target_modules=["query"]))
    net.save_pretrained(tmp_path / "with")
    transformers.forget_adapters(net)
    with pytest.raises(ValueError, match="No adapter loaded"):
        net.active_adapters()  # if this passes, _hf_peft_config_loaded has changed
    net.save_pretrained(tmp_path / "without")
    names = {p.name for p in tmp_path.glob("*/*.safetensors")}
    assert names == {"adapter_model.safetensors", "model.safetensors"}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_transformers_blocks_recompute_by_a_function() -> None:
    net: Any = bert().base_model.model
    net.train()
    blocks = transformers.checkpointing_blocks(net)
    assert blocks and all(
        transformers.checkpointing_function(b) is None for b in blocks
    )
    net.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    live = [b for b in blocks if transformers.checkpointing_function(b)]
    assert live, "_gradient_checkpointing_func has changed"
    calls = []
    for block in live:
        function: Any = transformers.checkpointing_function(block)

        def counted(*args: Any, function: Any = function, **kwargs: Any) -> Any:
            calls.append(function)
            return function(*args, **kwargs)

        transformers.set_checkpointing_function(block, counted)
    net(**tokens()).loss.backward()
    assert calls, "gradient checkpointing no longer calls _gradient_checkpointing_func"


def test_transformers_says_which_attention_it_loaded() -> None:
    found = transformers.attention_implementation(bert().get_base_model())
    assert found in ("eager", "sdpa"), "config._attn_implementation has changed"


class Root(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.child = nn.Linear(2, 2)

    def forward(self) -> Tensor:
        weight: Tensor = self.weight  # Pyro's store now has it
        return weight


def test_pyro_lists_its_messengers() -> None:
    with poutine.trace() as handler:
        found = compat_pyro.messengers()
        assert any(each is handler for each in found), "_PYRO_STACK has changed"
    assert not compat_pyro.messengers()


def test_pyro_frames_show_mcmc() -> None:
    seen = []

    def model() -> None:
        seen.append(compat_pyro.mcmc_is_running())
        pyro.sample("x", pyro.distributions.Normal(0.0, 1.0))

    model()
    MCMC(NUTS(model), num_samples=1, warmup_steps=1, disable_progbar=True).run()
    assert seen[0] is False and all(seen[1:]), "pyro.infer.mcmc has moved"


def test_pyro_names_roots_and_takes_another_name() -> None:
    root = Root()
    compat_pyro.rename(root, "other")
    assert compat_pyro.name_of(root) == "other"
    root()
    held = compat_pyro.held_parameters()
    assert held["other.weight"] is compat_pyro.plain_parameter(root, "weight"), (
        "ParamStoreDict._params has changed"
    )
    again = copy.deepcopy(root)
    compat_pyro.start_as_root(again)
    compat_pyro.rename(again, "third")
    assert compat_pyro.name_of(again) == "third"


def test_pyro_is_not_told_of_what_is_read_plainly() -> None:
    root = Root()
    assert isinstance(compat_pyro.plain_child(root, "child"), nn.Linear)
    assert compat_pyro.plain_parameter(root, "weight") is not None
    assert compat_pyro.plain_parameter(root, "nothing") is None
    assert not [*pyro.get_param_store().keys()], "reading a parameter registers it"


def test_pyro_optimizers_show_a_state_that_waits() -> None:
    optimizer = pyro.optim.Adam({"lr": 0.1})
    assert not compat_pyro.restored_without_a_step(optimizer)
    optimizer.set_state({"some parameter": {}})
    assert compat_pyro.restored_without_a_step(optimizer), (
        "PyroOptim._state_waiting_to_be_consumed has changed"
    )


def test_pyro_autoguides_split_their_latent() -> None:
    def model() -> None:
        ones = torch.ones(2)
        pyro.sample("a", pyro.distributions.Normal(ones, 1.0).to_event(1))
        pyro.sample("b", pyro.distributions.Normal(0.0, 1.0))

    guide = AutoDiagonalNormal(model)
    guide()
    parts = list(compat_pyro.unpack_latent(guide, torch.arange(3.0)))
    found = {site["name"]: value.tolist() for site, value in parts}
    assert found == {"a": [0.0, 1.0], "b": 2.0}, "AutoContinuous._unpack_latent"


def test_every_function_says_why_it_is_private() -> None:
    for module in (compat_torch, peft, transformers, compat_pyro):
        for name in module.__all__:
            function = getattr(module, name)
            if function.__module__ == module.__name__:
                assert function.__doc__, name


@pytest.mark.parametrize("module", [compat_torch, peft, transformers, compat_pyro])
def test_every_function_is_tested_here(module: Any) -> None:
    source = Path(__file__).read_text()
    for name in module.__all__:
        if getattr(module, name).__module__ == module.__name__:
            assert f".{name}(" in source, name


def test_pyros_handlers_are_unwrapped() -> None:
    def program() -> None: ...

    handled = poutine.scale(poutine.block(program), scale=2.0)
    assert compat_pyro.innermost(handled) is program, "pyro.poutine.messenger.unwrap"
    assert compat_pyro.innermost(program) is program
    guide = AutoDiagonalNormal(handled)
    assert compat_pyro.model_of(guide) is program, "AutoGuide._model has changed"
    assert compat_pyro.model_of(program) is None
    assert compat_pyro.model_of(copy.deepcopy(guide)) is None


def test_a_thread_in_pyro_is_found_by_its_frames() -> None:
    entered, leave = threading.Event(), threading.Event()

    def program() -> None:
        entered.set()
        leave.wait(20)

    def find() -> str | None:
        return compat_pyro.other_thread_in_pyro("pyro.infer.", "pyro.poutine.")

    thread = threading.Thread(target=poutine.trace(program), name="other")
    assert find() is None
    thread.start()
    entered.wait(20)
    try:
        assert find() == "other"
        assert compat_pyro.other_thread_in_pyro("pyro.infer.") is None
        with poutine.trace():
            assert find() == "other"
    finally:
        leave.set()
        thread.join()
    assert find() is None


def test_transformers_says_which_parameters_its_checkpoint_held(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(logging.get_logger(), "disabled", True)
        net = BertForSequenceClassification.from_pretrained(tmp_path)
    new = {
        n for n, p in net.named_parameters() if not transformers.is_from_checkpoint(p)
    }
    assert new == {"classifier.weight", "classifier.bias"}
    # as the values change their place or precision
    net.double().half()
    for name, parameter in net.named_parameters():
        assert transformers.is_from_checkpoint(parameter) == (name not in new)


def test_a_network_tells_what_it_ties() -> None:
    tied = transformers.tied_names(bases.gpt2())
    assert tied == {"lm_head.weight": "transformer.wte.weight"}
    assert transformers.tied_names(bases.gpt2(tied=False)) == {}
    assert transformers.tied_names(torch.nn.Linear(1, 1)) == {}

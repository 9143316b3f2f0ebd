"""A run goes on upon the base that it came from, and on no other unless told to."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import runs
import torch
from accelerate import dispatch_model
from bases import bert, llama
from nets import tokens
from peft import LoraConfig, get_peft_model
from stored import perturbed, predicted, same_predictions
from torch import Tensor, nn

from lrvd_pyro.likelihoods import Categorical
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.storage.export import export_peft
from lrvd_pyro.storage.folder import load, save
from lrvd_pyro.storage.hashes import seal
from lrvd_pyro.training.checkpoints import checkpoint, resume

pytestmark = [
    # PEFT's own, of what this file does on purpose.
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`"),
]

PLACES = {"model.embed_tokens": "disk", "lm_head": "disk", "model.norm": "cpu"}
PLACES |= {"model.layers.0": "disk", "model.layers.1": "cpu", "model.rotary_emb": "cpu"}


class FirstToken(Categorical):
    """The next token as the label of a text."""

    def summarize(self, predictions: Tensor) -> dict[str, Tensor]:
        return super().summarize(predictions[:, :, -1])


class Quantized(nn.Module):
    """A perceptron whose frozen layer holds its weights as few bits or as numbers."""

    def __init__(self, store: str) -> None:
        super().__init__()
        self.inner = nets.Perceptron()
        whole = torch.randint(-7, 8, (6, 5)).float()
        kinds: dict[str, Tensor] = {"whole": whole, "half": whole.half()}
        kinds |= {"8 bits": whole.to(torch.int8)}
        kinds |= {"4 bits": torch.zeros(15, 1, dtype=torch.uint8)}
        self.weight = nn.Parameter(kinds[store], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.shape == (6, 5):
            x = (x @ self.weight.to(x.dtype).T).tanh() @ self.weight.to(x.dtype)
        return self.inner(x)


def again(make: Callable[[], Any]) -> Any:
    """The same base at each call."""
    torch.manual_seed(7)
    return make()


def on(net: nn.Module, **options: Any) -> tuple[Any, Any]:
    """A trained pair on a base."""
    config: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"]} | options
    likelihood = FirstToken() if hasattr(net, "lm_head") else Categorical()
    net = get_peft_model(net, LoraConfig(**config))
    model = GateLoRA(net, num_data=60, likelihood=likelihood)
    return model, perturbed(model)


def offloaded(folder: Path) -> Any:
    """A base whose frozen weights are on disk, those that it ties among them."""
    net = again(llama)
    return dispatch_model(
        net, PLACES, main_device="cpu", offload_dir=folder, force_hooks=True
    )


def one_name_each(path: Path) -> None:
    """A folder as version 0.1 wrote it, whose fingerprint left out second names."""
    config = json.loads((path / "lrvd_config.json").read_text())
    del config["base"]["lm_head.weight"]
    (path / "lrvd_config.json").write_text(json.dumps(config))
    seal(path)


# Where weights are kept


@pytest.mark.parametrize("first", ["disk", "memory"])
def test_weights_on_disk_are_those_in_memory(first: str, tmp_path: Path) -> None:
    disk, memory = offloaded(tmp_path / "weights"), again(llama)
    made, later = (disk, memory) if first == "disk" else (memory, disk)
    pair = on(made, layers_to_transform=[1])
    path = save(tmp_path / "run", *pair)
    loaded = load(path, later, likelihood=FirstToken())
    same_predictions(pair, loaded, tokens(4, labels=False))


def test_another_base_is_noticed_by_what_is_in_memory(tmp_path: Path) -> None:
    path = save(tmp_path / "run", *on(again(llama), layers_to_transform=[1]))
    other = offloaded(tmp_path / "weights")
    other.model.norm.weight.data += 1e-3
    with pytest.raises(ValueError, match="norm.weight has the values .*1 differences"):
        load(path, other, likelihood=FirstToken())


def test_values_of_a_class_of_its_own_are_not_read(tmp_path: Path) -> None:
    class Sharded(Tensor):
        """As torch's DTensor, which refuses plain tensors beside it."""

        def __getitem__(self, index: object) -> Any:
            pytest.fail("read")

    made, later = again(nets.Perceptron), again(nets.Perceptron)
    own = later.hidden.weight.data.as_subclass(Sharded)
    later.hidden.weight = nn.Parameter(own)
    pair = on(made, target_modules=["out"])
    load(save(tmp_path / "run", *pair), later)


# What PEFT wraps


def test_a_saved_embedding_leaves_the_tied_head_to_the_base(tmp_path: Path) -> None:
    options = {"modules_to_save": ["embed_tokens"]}
    pair = on(again(llama), **options)
    path = save(tmp_path / "run", *pair)
    same_predictions(
        pair, load(path, again(llama), likelihood=FirstToken()), tokens(4, labels=False)
    )
    export_peft(tmp_path / "out", *pair, probe=tokens(4, labels=False))
    other = again(llama)
    other.lm_head.weight.data += 1e-3
    with pytest.raises(ValueError, match="lm_head.weight has the values"):
        load(path, other, likelihood=FirstToken())
    one_name_each(path)
    load(path, again(llama), likelihood=FirstToken())


def test_a_run_goes_on_under_another_start_of_its_trained_head(tmp_path: Path) -> None:
    run = runs.fresh("svi", bert_with_a_new_head())
    checkpoint(tmp_path / "run", **arguments(run))
    other = runs.fresh("svi", bert_with_a_new_head())
    resume(tmp_path / "run", **arguments(other))
    inputs = tokens(4, labels=False)
    pairs = [(each["model"], each["guide"]) for each in (run, other)]
    same_predictions(pairs[0], pairs[1], inputs)


def bert_with_a_new_head() -> Any:
    net = again(bert)
    torch.seed()  # as a new process has one
    nn.init.normal_(net.classifier.weight)
    options: dict[str, Any] = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    return get_peft_model(net, LoraConfig(r=2, init_lora_weights=False, **options))


def arguments(run: runs.Run) -> Any:
    return {name: run[name] for name in ("model", "guide", "optimizer", "elbo")}


# Quantized bases, and the way past the check


@pytest.mark.parametrize("store", ["8 bits", "4 bits"])
def test_a_quantized_base_comes_back_quantized_or_by_an_option(
    store: str, tmp_path: Path
) -> None:
    pair = on(again(lambda: Quantized(store)), target_modules=["out"])
    path, inputs = save(tmp_path / "run", *pair), {"x": torch.randn(4, 5)}
    same_predictions(pair, load(path, again(lambda: Quantized(store))), inputs)
    whole = again(lambda: Quantized("whole"))
    with pytest.raises(
        ValueError, match=r"stored as torch.float32, not as torch.u?int8 .*check_base=F"
    ):
        load(path, whole)
    loaded = load(path, whole, check_base=False)
    assert whole.weight.dtype == torch.float32
    gates = [each.space.weights("lora_B")[0] for each in (pair[0], loaded[0])]
    assert torch.equal(*gates)
    if store == "8 bits":
        same_predictions(pair, loaded, inputs)


def test_a_base_in_half_precision_has_values_to_compare(tmp_path: Path) -> None:
    pair = on(again(lambda: Quantized("half")), target_modules=["out"])
    path = save(tmp_path / "run", *pair)
    load(path, again(lambda: Quantized("whole")))
    other = again(lambda: Quantized("whole"))
    other.weight.data += 1
    with pytest.raises(ValueError, match="weight has the values"):
        load(path, other)


def test_the_check_of_the_base_can_be_left_out(tmp_path: Path) -> None:
    pair = on(again(nets.Perceptron), target_modules=["out"])
    path, inputs = save(tmp_path / "run", *pair), {"x": torch.randn(4, 5)}
    other = again(nets.Perceptron)
    other.hidden.weight.data.neg_()
    with pytest.raises(ValueError, match=r"load\(path, net, check_base=False\)"):
        load(path, other)
    loaded = load(path, other, check_base=False)
    probs = [predicted(*each, inputs).samples for each in (pair, loaded)]
    assert not torch.equal(*probs)


def test_a_base_without_the_modules_of_the_adapter_is_refused(tmp_path: Path) -> None:
    pair = on(again(llama))
    path, short = save(tmp_path / "run", *pair), again(llama)
    del short.model.layers[1]
    before = set(short.state_dict())
    with pytest.raises(ValueError, match=r"lacks 1 modules .*layers.1.*q_proj'\]; pas"):
        load(path, short, check_base=False, likelihood=FirstToken())
    assert set(short.state_dict()) == before and not hasattr(short, "peft_config")


def test_a_base_of_other_shapes_is_refused_without_the_check(tmp_path: Path) -> None:
    path = save(tmp_path / "run", *on(again(nets.Perceptron), target_modules=["out"]))
    wide = nets.Perceptron(hidden=7)
    with pytest.raises(ValueError, match=r"lora_A.weight is .*\[2, 6\], .*\[2, 7\]"):
        load(path, wide, check_base=False)
    assert set(wide.state_dict()) == set(nets.Perceptron().state_dict())


def test_resume_takes_another_base_only_if_told_to(tmp_path: Path) -> None:
    def run(store: str) -> Any:
        net = again(lambda: Quantized(store))
        config = LoraConfig(r=2, target_modules=["hidden", "out"])
        return arguments(runs.fresh("svi", get_peft_model(net, config)))

    first, path = run("8 bits"), tmp_path / "run"
    perturbed(first["model"], first["guide"])
    checkpoint(path, **first)
    resume(path, **run("8 bits"))
    other = run("whole")
    with pytest.raises(ValueError, match=r"float32, not as torch.int8.*check_base=Fal"):
        resume(path, **other)
    resume(path, **other, check_base=False)
    inputs = {"x": torch.randn(4, 5)}
    pairs = [(each["model"], each["guide"]) for each in (first, other)]
    same_predictions(pairs[0], pairs[1], inputs)

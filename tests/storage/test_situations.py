"""What PEFT makes of a network is served to the end, or refused with the way out.

To the end: training, prediction, removal, saving, and exports that plain PEFT and
Transformers load, all upon the base made again.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import bert, gpt2, llama
from families import PRIORS
from nets import tokens
from peft import (
    LoraConfig,
    get_peft_model,
)
from pyro.infer import SVI
from stored import mean_logits, plain_logits, same_predictions
from torch import Tensor, nn

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.likelihoods import Categorical
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.selection.removal import select
from lrvd_pyro.storage.export import export_peft

pytestmark = [
    # PEFT's own, of what this file does on purpose.
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`"),
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
    # The library's own, of adapters that are not active.
    pytest.mark.filterwarnings("ignore:the loss has no gradient .*before"),
]

TARGETS = ["query", "value"]
Make = Callable[[Any], Any]


class LastToken(Categorical):
    """The next token as the label of a text."""

    def __call__(self, predictions: Tensor, labels: Any, num_data: int) -> None:
        super().__call__(predictions[:, -1], labels, num_data)

    def summarize(self, predictions: Tensor) -> dict[str, Tensor]:
        return super().summarize(predictions[:, :, -1])


def again(base: Callable[[], Any]) -> Any:
    """The same base at each call, in float32: it is loaded from files of that."""
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float32)
    return base().eval()


def config(**options: Any) -> LoraConfig:
    return LoraConfig(**({"r": 4, "target_modules": TARGETS} | options))


def peft_of(**options: Any) -> Make:
    return lambda net: get_peft_model(net, config(**options))


def classifier(**options: Any) -> Make:
    return peft_of(task_type="SEQ_CLS", **options)


def added(**options: Any) -> Make:
    def make(net: Any) -> Any:
        net.add_adapter(config(**options))
        return net

    return make


def second(net: Any) -> Any:
    net = get_peft_model(net, config(task_type="SEQ_CLS"))
    net.add_adapter("other", config(r=2, target_modules=["key"]))
    return net


def on_an_inner_net(net: Any) -> Any:
    """A notebook cell that ran twice, of which the second run takes off the wrapper."""
    inner = get_peft_model(net, config(target_modules=["key"]), "before")
    return get_peft_model(inner.get_base_model(), config(), "default")


def around_own_adapter(net: Any) -> Any:
    net.add_adapter(config(target_modules=["key"]), "before")
    return get_peft_model(net, config(), "default")


def weighted(net: Any) -> Any:
    net = get_peft_model(net, config(), "x")
    net.add_adapter("y", config())
    net.add_weighted_adapter(["x", "y"], [0.5, 0.5], "z", combination_type="cat")
    net.set_adapter("z")
    return net


REPLICATED = {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]}
TOKENS = {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}
HEAD = {"target_modules": ["q_proj", "lm_head"]}
TIED = r"'lm_head' shares its weight with \['{}'\].*mode=\"pruned\".*untie"

# The base, PEFT upon it, and why no merged network can be written.
SERVED: dict[str, tuple[Callable[[], Any], Make, str]] = {
    "plain": (bert, classifier(), ""),
    "no task type": (bert, peft_of(), ""),
    "add_adapter": (bert, added(), ""),
    "rank_pattern": (
        bert,
        classifier(rank_pattern={"query": 2}, alpha_pattern={"value": 3}),
        "",
    ),
    "rslora": (bert, classifier(use_rslora=True), ""),
    "dora": (bert, classifier(use_dora=True), ""),
    "lora_bias": (bert, classifier(lora_bias=True), ""),
    "bias all": (bert, classifier(bias="all"), ""),
    "layers_to_transform": (bert, classifier(layers_to_transform=[1]), ""),
    "exclude_modules": (
        bert,
        classifier(target_modules="all-linear", exclude_modules=["key"]),
        "",
    ),
    "the head is a target": (bert, peft_of(target_modules=["value", "classifier"]), ""),
    "modules_to_save": (bert, classifier(modules_to_save=["pooler"]), ""),
    "an embedding is saved": (bert, peft_of(modules_to_save=["word_embeddings"]), ""),
    "tokens": (bert, classifier(trainable_token_indices={"word_embeddings": [1]}), ""),
    "tokens, add_adapter": (
        bert,
        added(trainable_token_indices={"word_embeddings": [1, 2]}),
        "",
    ),
    "tied tokens": (llama, peft_of(**TOKENS), ""),
    "tied tokens, both": (llama, peft_of(**TOKENS, ensure_weight_tying=True), ""),
    "a tied head is saved": (
        llama,
        peft_of(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "",
    ),
    "a second adapter": (bert, second, ""),
    "an inner net": (bert, on_an_inner_net, ""),
    "around add_adapter": (bert, around_own_adapter, ""),
    "a weighted adapter": (bert, weighted, ""),
    "Conv1D": (gpt2, peft_of(target_modules=["c_attn"], fan_in_fan_out=True), ""),
    "an untied head": (
        lambda: gpt2(tied=False),
        peft_of(target_modules=["lm_head"]),
        "",
    ),
    "gaussian": (bert, classifier(init_lora_weights="gaussian"), ""),
    "orthogonal": (bert, classifier(init_lora_weights="orthogonal"), ""),
    "tied head": (llama, peft_of(**HEAD), TIED.format("model.embed_tokens")),
    "tied head, add_adapter": (llama, added(**HEAD), TIED.format("model.embed_tokens")),
    "tied head of GPT-2": (
        gpt2,
        peft_of(target_modules=["lm_head"]),
        TIED.format("transformer.wte"),
    ),
    "layer_replication": (
        llama,
        peft_of(**REPLICATED),
        'layer_replication shares the weights.*use mode="pruned"',
    ),
}


def trained(net: Any, batch: Any, *, of_text: bool) -> tuple[Any, Any]:
    """A pair after two steps and the removal of every third component."""
    likelihood = LastToken() if of_text else Categorical()
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    model = GateLoRA(net, prior=PRIORS["ARD()"](), likelihood=likelihood, num_data=60)
    guide = RankDiagonal(model, learn_mean=True)
    elbo = lrvd.RankELBO(noise="batch")
    svi = SVI(model, guide, lrvd.optim.AdamW(lr=3e-2), elbo)
    for _ in range(2):
        svi.step(**batch)
    select(model, guide, keep=torch.arange(model.space.size) % 3 > 0)
    net.eval()
    return model, guide


@pytest.mark.parametrize("situation", SERVED)
def test_what_is_accepted_is_served_to_the_end(situation: str, tmp_path: Path) -> None:
    base, make, unmerged = SERVED[situation]
    batch, of_text = tokens(4), base is not bert
    model, guide = trained(make(again(base)), batch, of_text=of_text)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    lrvd.save(tmp_path / "run", model, guide)
    likelihood = LastToken() if of_text else None
    loaded = lrvd.load(tmp_path / "run", again(base), likelihood=likelihood)
    same_predictions((model, guide), loaded, inputs)
    expected = mean_logits(model, guide, inputs)
    export_peft(tmp_path / "pruned", model, guide)
    close(plain_logits(again(base), tmp_path / "pruned", inputs), expected)
    if unmerged:
        with pytest.raises(ValueError, match=unmerged):
            export_peft(tmp_path / "merged", model, guide, mode="merged")
        return
    export_peft(tmp_path / "merged", model, guide, mode="merged")
    with torch.no_grad():
        net = type(again(base)).from_pretrained(tmp_path / "merged").eval()
        close(net(**inputs).logits, expected)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

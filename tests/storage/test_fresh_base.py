"""The export's probe sees what others see: the base without anything trained."""

from pathlib import Path
from typing import Any

import nets
import pytest
import runs
import torch
from nets import tokens
from peft import LoraConfig, get_peft_model
from stored import mean_logits, perturbed, plain_logits, same_predictions
from transformers import (
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from lrvd_pyro.models import GateLoRA
from lrvd_pyro.storage import export
from lrvd_pyro.storage.embeddings import base_vocabulary
from lrvd_pyro.storage.export import export_peft
from lrvd_pyro.storage.folder import load, save
from lrvd_pyro.training.checkpoints import checkpoint, resume

ROWS = 53
WORDS = {"input_ids": torch.tensor([[1, 2, 51], [3, 52, 4]])}
WORDS_OF_50 = {"input_ids": torch.tensor([[1, 2, 9], [3, 49, 4]])}
# What an adapter can be on embeddings that were resized before it.
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {},
    "saved": {"modules_to_save": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [3, 51]},
    "head": {"target_modules": ["q_proj", "score"], "modules_to_save": ["norm"]},
}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a Llama of 50 tokens."""
    torch.set_default_dtype(torch.float32)
    config = LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.update({"intermediate_size": 32, "vocab_size": 50, "pad_token_id": 0})
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def llama(files: Path, rows: int = 0) -> Any:
    net = LlamaForSequenceClassification.from_pretrained(files).eval()
    if rows:
        net.resize_token_embeddings(rows)
    return net


def on(net: Any, **options: Any) -> tuple[Any, Any]:
    config = {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"} | options
    model = GateLoRA(get_peft_model(net, LoraConfig(r=2, **config)), num_data=60)
    return model, perturbed(model)


# The probe


def test_a_trained_bias_that_the_export_lacks_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = GateLoRA(nets.bert(bias="all"), num_data=60)
    guide, honest = perturbed(model), export.plain_adapter
    export_peft(tmp_path / "right", model, guide, probe=tokens(4))

    def without(*args: Any, **options: Any) -> Any:
        config, tensors = honest(*args, **options)
        return config, {n: t for n, t in tensors.items() if "pooler" not in n}

    monkeypatch.setattr(export, "plain_adapter", without)
    with pytest.raises(ValueError, match="logits differ by"):
        export_peft(tmp_path / "out", model, guide, probe=tokens(4))


def test_the_probe_loads_the_folder_that_the_base_came_from(
    files: Path, tmp_path: Path
) -> None:
    pair = on(llama(files), modules_to_save=["norm"])
    before = torch.get_rng_state()
    export_peft(tmp_path / "out", *pair, probe=WORDS_OF_50)
    assert torch.equal(torch.get_rng_state(), before)
    other = llama(files)
    other.model.layers[0].mlp.up_proj.weight.data += 1e-2
    pair = on(other)
    message = "not the base in .*up_proj.weight has the values .*merged.*modules_to_sav"
    with pytest.raises(ValueError, match=message):
        export_peft(tmp_path / "other", *pair, probe=WORDS_OF_50)
    assert not (tmp_path / "other").exists()
    export_peft(tmp_path / "other", *pair, mode="merged", probe=WORDS_OF_50)


def test_a_new_head_on_a_folder_without_one_goes_along(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    config = nets.bert_config()
    BertForSequenceClassification(config).bert.save_pretrained(tmp_path / "base")
    net = BertForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=nets.CLASSES
    )
    pair = on(net, target_modules=["query"])
    export_peft(tmp_path / "out", *pair, probe=tokens(4))


# Embeddings of other rows than the base's files have


@pytest.mark.parametrize("kind", OPTIONS)
def test_embeddings_resized_before_peft_are_stored_and_exported(
    kind: str, files: Path, tmp_path: Path
) -> None:
    pair = on(llama(files, ROWS), **OPTIONS[kind])
    served(pair, files, tmp_path)


@pytest.mark.parametrize("moment", ["PEFT", "the model"])
def test_embeddings_resized_after_peft_are_stored_and_exported(
    moment: str, files: Path, tmp_path: Path
) -> None:
    net = get_peft_model(
        llama(files), LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    )
    if moment == "PEFT":
        net.resize_token_embeddings(ROWS)
    model = GateLoRA(net, num_data=60)
    guide = perturbed(model)
    if moment == "the model":
        net.resize_token_embeddings(ROWS)
    served((model, guide), files, tmp_path)


def served(pair: Any, files: Path, tmp_path: Path) -> None:
    """A pair comes back, and plain PEFT has its mean, on rows that are random anew."""
    path = save(tmp_path / "run", *pair)
    torch.manual_seed(1)
    same_predictions(pair, load(path, llama(files, ROWS)), WORDS)
    export_peft(tmp_path / "out", *pair, probe=WORDS)
    export_peft(tmp_path / "merged", *pair, mode="merged", probe=WORDS)
    expected = mean_logits(*pair, WORDS)
    for folder in (path, tmp_path / "out"):
        found = plain_logits(llama(files, ROWS), folder, WORDS)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    short = llama(files)
    with pytest.raises(ValueError, match=r"50 rows, .* with 53; call net.resize_to"):
        load(path, short)
    assert not hasattr(short, "peft_config")


def test_rows_of_a_base_without_files_are_checked(files: Path, tmp_path: Path) -> None:
    def unnamed(seed: int) -> Any:
        torch.manual_seed(seed)
        net = llama(files, ROWS)
        net.config.name_or_path = ""
        return net

    pair = on(unnamed(0))
    path = save(tmp_path / "run", *pair)
    same_predictions(pair, load(path, unnamed(0)), WORDS)
    with pytest.raises(ValueError, match=r"random: make them the .*\['embed_tokens'\]"):
        load(path, unnamed(1))


def test_resume_says_what_to_do_with_rows_that_are_random(
    files: Path, tmp_path: Path
) -> None:
    def run() -> Any:
        run = runs.fresh("svi", on(llama(files, ROWS))[0].base_net)
        return {n: run[n] for n in ("model", "guide", "optimizer", "elbo")}

    checkpoint(tmp_path / "file", **run())
    other = run()
    other["model"].base_net.get_input_embeddings().weight.data[-1] += 1
    with pytest.raises(ValueError, match="another base: .*If resize_token_embeddings"):
        resume(tmp_path / "file", **other)


def test_the_vocabulary_of_the_files_is_known_or_none(files: Path) -> None:
    net = llama(files, ROWS)
    assert base_vocabulary(net) == 50
    net.config.name_or_path = "nobody/has-this"
    assert base_vocabulary(net) is None
    assert base_vocabulary(nets.Perceptron()) is None

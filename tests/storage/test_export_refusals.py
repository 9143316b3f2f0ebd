"""What cannot be exported is refused by name, and leaves nothing on disk."""

from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from nets import tokens
from stored import learned

from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.storage import export
from lrvd_pyro.storage.export import export_peft

pytestmark = pytest.mark.filterwarnings(nets.GROUPED)


def test_a_probe_that_disagrees_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = GateLoRA(nets.bert(), num_data=60)
    guide = learned(model)
    honest = export.plain_adapter

    def wrong(*args: Any, **options: Any) -> Any:
        config, tensors = honest(*args, **options)
        return config, {
            n: t * (2.0 if "lora_B" in n else 1) for n, t in tensors.items()
        }

    monkeypatch.setattr(export, "plain_adapter", wrong)
    with pytest.raises(ValueError, match="logits differ by .* expected 1e-05 of that"):
        export_peft(tmp_path / "out", model, guide, probe=tokens(4))
    assert not list(tmp_path.iterdir())


def test_what_stands_there_is_not_replaced(tmp_path: Path) -> None:
    model = GateLoRA(nets.perceptron(), num_data=60)
    (tmp_path / "empty").mkdir()
    export_peft(tmp_path / "empty", model, RankDiagonal(model))
    with pytest.raises(ValueError, match="holds .*adapter_config.json.*rmtree"):
        export_peft(tmp_path / "empty", model, RankDiagonal(model))


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    model = GateLoRA(nets.perceptron(), num_data=60)
    mode: Any = "prune"
    with pytest.raises(ValueError, match='mode=\'prune\'; expected "pruned", "padded"'):
        export_peft(tmp_path / "out", model, RankDiagonal(model), mode=mode)


def test_merging_asks_for_a_transformers_network(tmp_path: Path) -> None:
    model = GateLoRA(nets.perceptron(), num_data=60)
    with pytest.raises(TypeError, match='a Perceptron; use mode="pruned"'):
        export_peft(tmp_path / "out", model, RankDiagonal(model), mode="merged")
    assert not list(tmp_path.iterdir())


def test_a_base_that_the_adapter_changed_is_refused_but_merged(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)  # PEFT's decomposition takes no double
    net, inputs = nets.bert(init_lora_weights="olora"), tokens(4, labels=False)
    model = GateLoRA(net, num_data=60)
    with pytest.raises(ValueError, match="'olora' changed the base weights.*merged"):
        export_peft(tmp_path / "out", model, RankDiagonal(model))
    guide = RankDiagonal(model)
    export_peft(tmp_path / "out", model, guide, mode="merged", probe=inputs)


def test_parameters_that_no_adapter_holds_are_refused_but_merged(
    tmp_path: Path,
) -> None:
    net, inputs = nets.bert(), tokens(4, labels=False)
    net.base_model.model.bert.pooler.dense.weight.requires_grad_(True)
    model = GateLoRA(net, num_data=60)
    guide = RankDiagonal(model)
    with pytest.raises(ValueError, match=r"\['bert.pooler.dense'\] train .*to_save"):
        export_peft(tmp_path / "out", model, guide)
    export_peft(tmp_path / "out", model, guide, mode="merged", probe=inputs)


def test_a_grouped_convolution_cannot_be_padded(tmp_path: Path) -> None:
    model = GateLoRA(nets.grouped(rank_pattern={"first": 2}), num_data=60)
    with pytest.raises(TypeError, match="'first' is a grouped .*up to rank 4; use mod"):
        export_peft(tmp_path / "out", model, RankDiagonal(model), mode="padded")


def test_a_disabled_adapter_is_refused(tmp_path: Path) -> None:
    model = GateLoRA(nets.perceptron(), num_data=60)
    with model.base_net.disable_adapter():
        with pytest.raises(RuntimeError, match="is disabled"):
            export_peft(tmp_path / "out", model, RankDiagonal(model))

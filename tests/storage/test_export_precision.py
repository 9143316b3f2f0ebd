"""The probe of an export compares in the precision in which the network runs."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from nets import tokens
from stored import learned
from torch import nn

from lrvd_pyro.models import GateLoRA
from lrvd_pyro.storage import export
from lrvd_pyro.storage.export import export_peft


@pytest.fixture(autouse=True)
def in_single_precision() -> Iterator[None]:
    """Networks in float32, and no accelerator left behind."""
    torch.set_default_dtype(torch.float32)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def prepared(net: nn.Module) -> Any:
    return Accelerator(mixed_precision="bf16", cpu=True).prepare(net)


def of_a_prepared_base() -> Any:
    base = nets.BertForSequenceClassification(nets.bert_config())
    targets = ["query", "value"]
    return nets.lora(prepared(base), target_modules=targets, task_type="SEQ_CLS")


RUNS: dict[str, tuple[Callable[[], Any], bool]] = {
    "accelerate": (lambda: prepared(nets.bert()), False),
    "accelerate-base": (of_a_prepared_base, False),
    "autocast": (nets.bert, True),
    "accelerate-autocast": (lambda: prepared(nets.bert()), True),
}
MODES: list[Any] = ["pruned", "padded", "merged"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("run", RUNS)
def test_a_right_export_passes_its_probe_under_autocast(
    run: str, mode: Any, tmp_path: Path
) -> None:
    make, autocast = RUNS[run]
    model, inputs = GateLoRA(make().eval(), num_data=60), tokens(8, labels=False)
    guide = learned(model)
    before = nets.hooks(model.base_net)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        export_peft(tmp_path / "out", model, guide, mode=mode, probe=inputs)
        assert torch.is_autocast_enabled("cpu") is autocast
    assert nets.hooks(model.base_net) == before


@pytest.mark.parametrize("run", [*RUNS, "single precision"])
def test_a_wrong_export_does_not(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the adapter; in single precision one part in a thousand too much."""
    make, autocast = RUNS.get(run, (nets.bert, False))
    half = run in RUNS
    model, inputs = GateLoRA(make().eval(), num_data=60), tokens(8, labels=False)
    guide = learned(model)
    honest, factor = export.plain_adapter, 2.0 if half else 1.001

    def wrong(*args: Any, **options: Any) -> Any:
        config, tensors = honest(*args, **options)
        return config, {
            n: t * (factor if "lora_B" in n else 1) for n, t in tensors.items()
        }

    monkeypatch.setattr(export, "plain_adapter", wrong)
    expected = "expected 0.02 of that at most in torch.bfloat16. N"
    message = expected if half else "expected 1e-05 of that at most. Nothing was"
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with pytest.raises(ValueError, match=message):
            export_peft(tmp_path / "out", model, guide, probe=inputs)
    assert not list(tmp_path.iterdir())

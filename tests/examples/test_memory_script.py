"""The benchmark of memory, made tiny."""

import json
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    from benchmarks import memory

    rows = ["the network alone", "RankSpace: coordinates, groups, cuts", "RankHistory"]
    monkeypatch.setattr(memory, "ROWS", {name: memory.ROWS[name] for name in rows})
    monkeypatch.setattr(memory, "SHAPES", ((2, 4), (3, 2)))
    # Beyond 4,096 components these are refused, of which a tiny network has none.
    monkeypatch.setattr(memory, "REFUSED", {})
    return memory


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork, with threads
def test_the_benchmark_of_memory_has_every_row(
    memory: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory.main(["--out", str(tmp_path / "a.jsonl")])
    lines = [
        json.loads(line)
        for line in (tmp_path / "a.jsonl").read_text().split("\n")
        if line
    ]
    assert [line["row"] for line in lines] == [*memory.ROWS] * 2
    assert [line["R"] for line in lines] == [8] * 3 + [6] * 3
    assert all(line["peak_mb"] > 0 and not line["refusal"] for line in lines)
    assert capsys.readouterr().out.count("\n") == 2 + len(memory.ROWS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_memory_beyond_the_limit_is_an_error(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "LIMIT", 1)
    with pytest.raises(SystemExit, match="more than 1 MB: .*RankHistory"):
        memory.main(["--out", str(tmp_path / "a.jsonl")])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_row_that_should_be_refused_and_is_not_is_an_error(
    memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "REFUSED", {"free": lambda net: None})
    with pytest.raises(RuntimeError, match="'free' at R = 8"):
        memory.measure(2, 4)

"""What the pictures draw, read back from the axes."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
import xarray
from matplotlib import pyplot
from nets import bert
from torch import Tensor

from lrvd_pyro.diagnostics import plots
from lrvd_pyro.diagnostics.calibration import calibration_report, scores
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.likelihoods.categorical import Categorical, CategoricalPrediction
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.selection.history import RankHistory
from lrvd_pyro.selection.removal import select

STEPS = [0, 10, 40]
matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    pyplot.close("all")


def history(steps: list[int] = STEPS, prune: bool = False) -> RankHistory:
    """A new log alpha at each step; with ``prune`` a module loses two components."""
    model = GateLoRA(bert(), num_data=60)
    guide = RankDiagonal(model)
    record = RankHistory(guide)
    for step in steps:
        with torch.no_grad():
            guide.log_variance.copy_(3 * torch.randn(model.space.size) - 1)
        record.record(step)
        if prune and step == steps[0]:
            keep = torch.arange(model.space.size) >= 2
            select(model, guide, keep=keep)
    return record


def drawn(line: Any) -> tuple[list[float], list[float]]:
    return [*map(float, line.get_xdata())], [*map(float, line.get_ydata())]


@pytest.mark.parametrize(
    ("by", "rows"),
    [("layer", ["0", "1"]), ("type", ["attention.self.query", "attention.self.value"])],
)
def test_the_heat_map_shows_the_effective_rank_per_module(
    by: Any, rows: list[str]
) -> None:
    record = history(prune=True)
    ax = plots.rank_heatmap(record, by=by)
    ranks = record.effective_ranks
    expected = [
        sum(r for name, r in ranks.items() if f".{row}." in f"{name}.") / 2
        for row in rows
    ]
    mesh = ax.collections[0]
    found = np.asarray(mesh.get_array()).reshape(2, len(STEPS))
    np.testing.assert_allclose(found, torch.stack(expected), rtol=1e-5)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == rows
    assert ax.get_xlabel() == "optimization step"
    assert ax.figure.axes[1].get_ylabel() == "effective rank per module"


def test_effective_rank_is_mean_and_sd_over_runs() -> None:
    runs = [history() for _ in range(3)]
    ax = plots.effective_rank(runs, label="GateLoRA")
    ranks = torch.stack([run.effective_rank for run in runs])
    steps, mean = drawn(ax.lines[0])
    assert steps == STEPS and mean == pytest.approx(ranks.mean(0).tolist())
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    sd = ranks.std(0)
    assert band.max() == pytest.approx(float((ranks.mean(0) + sd).max()))
    assert band.min() == pytest.approx(float((ranks.mean(0) - sd).min()))
    (text,) = ax.get_legend().get_texts()
    assert text.get_text() == "GateLoRA, mean ± sd of 3 runs"
    single = plots.effective_rank(runs[0], ax=ax)
    assert single is ax and len(ax.lines) == 2 and len(ax.collections) == 1
    assert drawn(ax.lines[1])[1] == pytest.approx(ranks[0].tolist())


def test_a_sweep_has_a_point_per_threshold() -> None:
    rows = [
        {"threshold": t, "rank": 10 + 2 * t + seed, "accuracy": 0.8, "nll": t + seed}
        for t in (3.0, -1.0)
        for seed in (0, 2)
    ]
    ax = plots.threshold_sweep(rows, score="nll", label="GateLoRA")
    x, y = drawn(ax.lines[0])
    assert x == [9.0, 17.0] and y == [0.0, 4.0]
    assert [text.get_text() for text in ax.texts] == ["-1", "3"]
    bars = ax.containers[0].lines[2]
    (low, high) = bars[1].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((-(2**0.5), 2**0.5))
    assert ax.get_ylabel() == "NLL (nats per datum)"
    assert ax.get_title() == "NLL by log alpha threshold"
    near = [dict(rows[0], threshold=9.0, rank=9.1), *rows]
    ax = plots.threshold_sweep(near, score="nll")
    assert len(ax.texts) == 2 and len(drawn(ax.lines[0])[0]) == 3
    flat = plots.threshold_sweep(rows)
    assert flat.get_ylim()[0] < 0.8 < flat.get_ylim()[1]


def predicted(n: int = 300) -> tuple[CategoricalPrediction, Tensor]:
    likelihood = Categorical()
    logits = torch.randn(n, 3) + torch.randn(8, n, 3)
    p = likelihood.collect(likelihood.summarize(2 * logits))
    return p, torch.distributions.Categorical(p.probs).sample()


def test_the_distances_from_the_diagonal_add_up_to_ece() -> None:
    p, labels = predicted()
    ax = plots.reliability_diagram(p, labels)
    mean, accuracy = (np.array(v) for v in drawn(ax.lines[1]))
    share = ax.patches[-1].get_data().values
    assert share.sum() == pytest.approx(1)
    ece = np.nansum(share * np.abs(mean - accuracy))
    assert ece == pytest.approx(scores(p.probs, labels)["ece"])
    bars = ax.containers[0]
    heights = np.array([bar.get_height() for bar in bars])
    np.testing.assert_allclose(heights, accuracy)
    assert bars[3].get_x() == pytest.approx(3 / 15) and len(bars) == 15


def test_a_confidence_of_1_is_in_the_last_bar() -> None:
    probs, none = torch.tensor([[1.0, 0.0], [0.99, 0.01], [1.0, 0.0]]), torch.zeros(3)
    p = CategoricalPrediction(probs, none, none)
    ax = plots.reliability_diagram(p, torch.tensor([0, 0, 1]))
    assert len(ax.containers[0]) == 15
    assert ax.containers[0][14].get_height() == pytest.approx(2 / 3)
    assert ax.patches[-1].get_data().values[14] == pytest.approx(1)


def test_the_risk_curve_ends_at_the_error_rate_and_has_the_area() -> None:
    p, labels = predicted()
    ax = plots.risk_coverage_curve(p, labels, label="GateLoRA")
    coverage, risk = drawn(ax.lines[0])
    report = calibration_report(p, labels, num_bootstrap=1)
    assert coverage[-1] == 1 and risk[-1] == pytest.approx(1 - report.accuracy.value)
    assert np.mean(risk) == pytest.approx(report.aurc.value)
    (text,) = ax.get_legend().get_texts()
    assert text.get_text() == f"GateLoRA, AURC {report.aurc.value:.3f}"


def gates(draws: Tensor, modules: list[str]) -> dict[str, Any]:
    variables = {"gate": (("chain", "draw", "gate_id"), draws[None].numpy())}
    return {"posterior": xarray.Dataset(variables, {"module": ("gate_id", modules)})}


def test_the_forest_has_the_interval_of_every_gate() -> None:
    draws = torch.linspace(0, 1, 101)[:, None] * torch.tensor([2.0, 1.0, 4.0])
    data = gates(draws, ["net.layer.0.query", "net.layer.0.query", "net.layer.1.query"])
    ax = plots.gate_forest(data, prob=0.8)
    medians = [drawn(line) for line in ax.lines]
    assert medians[0] == (pytest.approx([0.5, 1.0]), [0, 1])  # in order of medians
    assert medians[1] == (pytest.approx([2.0]), [3])
    ends = [[*s[:, 0]] for lines in ax.collections for s in lines.get_segments()]
    expected = [[0.1, 0.9], [0.2, 1.8], [0.4, 3.6]]
    assert ends == [pytest.approx(interval) for interval in expected]
    ticks = [tick.get_text() for tick in ax.get_yticklabels()]
    assert ticks == ["0.query", "1.query"]
    assert ax.get_xlabel() == "gate, median and 80% interval"
    unsorted = plots.gate_forest(data, sort=False)
    assert drawn(unsorted.lines[0])[0] == pytest.approx([1.0, 0.5])


P, LABELS = predicted(20)
ROWS = [{"threshold": 1.0, "rank": 3, "accuracy": 0.5}]
PICTURES: dict[str, Callable[[Any], Any]] = {
    "heat map": lambda ax: plots.rank_heatmap(history(), ax=ax),
    "effective rank": lambda ax: plots.effective_rank(history(), ax=ax),
    "sweep": lambda ax: plots.threshold_sweep(ROWS, ax=ax),
    "reliability": lambda ax: plots.reliability_diagram(P, LABELS, ax=ax),
    "risk": lambda ax: plots.risk_coverage_curve(P, LABELS, ax=ax),
    "energy": lambda ax: plots.energy_curves({"a": torch.ones(2)}, ax=ax),
    "forest": lambda ax: plots.gate_forest(gates(torch.randn(9, 2), ["a", "b"]), ax=ax),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_goes_on_given_axes_or_its_own(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure, (first, second) = pyplot.subplots(1, 2)
    assert PICTURES[name](second) is second
    assert second.has_data() and not first.has_data()
    own = PICTURES[name](None)
    assert own.figure is not figure and own.get_title()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="plots need matplotlib: pip install"):
        PICTURES[name](None)


def test_what_cannot_be_drawn_is_refused() -> None:
    for draw in (plots.rank_heatmap, lambda h: plots.effective_rank([history(), h])):
        with pytest.raises(ValueError, match=r"expected at least one history and two"):
            draw(history([3]))
    with pytest.raises(ValueError, match=r"got histories with \[\] records"):
        plots.effective_rank([])
    with pytest.raises(ValueError, match=r"were recorded at different steps"):
        plots.effective_rank([history(), history([0, 10, 50])])
    with pytest.raises(ValueError, match=r"1 rows with the columns \['accuracy', 'ran"):
        plots.threshold_sweep([{"rank": 3, "accuracy": 1.0}])
    with pytest.raises(ValueError, match=r"got 0 rows"):
        plots.threshold_sweep([])
    for draw_scores in (plots.reliability_diagram, plots.risk_coverage_curve):
        with pytest.raises(ValueError, match=r"do not match 20 predictions"):
            draw_scores(P, LABELS[:9])
    data = gates(torch.randn(9, 2), ["a", "b"])
    with pytest.raises(ValueError, match=r"prob=1.5 and variables \['gate'\]"):
        plots.gate_forest(data, prob=1.5)
    data["posterior"] = data["posterior"].rename(gate="factor")
    with pytest.raises(ValueError, match=r"variables \['factor'\]; expected"):
        plots.gate_forest(data)


def test_energy_curves_rise_from_none_to_all_of_each_module() -> None:
    values = {
        "encoder.layer.0.query": torch.tensor([3.0, 1.0, 0.0]),
        "encoder.layer.1.query": torch.tensor([2.0, 2.0]),
    }
    ax = plots.energy_curves(values)
    found = {line.get_label(): drawn(line) for line in ax.get_lines()}
    assert found["0.query"] == ([0, 1, 2, 3], pytest.approx([0, 0.9, 1, 1]))
    assert found["1.query"] == ([0, 1, 2], pytest.approx([0, 0.5, 1]))
    with pytest.raises(ValueError, match=r"of 1 modules \['dead'\] have no energy"):
        plots.energy_curves({"dead": torch.zeros(2)})

"""What has no noise by evidence is refused, and stays as it was."""

import warnings
from collections.abc import Iterator
from typing import Any

import nets
import pytest
import torch
from nets import tokens
from pyro import distributions as dist
from torch import Tensor, nn

import lrvd_pyro as lrvd
from lrvd_pyro.gauge import noise_by_evidence
from lrvd_pyro.guides import RankDiagonal, RankGuide, TiedDiagonal
from lrvd_pyro.models import FactorLoRA, GateLoRA

SIDES = ("lora_A", "lora_B")
# Small batches stand for large data here.
pytestmark = pytest.mark.filterwarnings("ignore:the batches have:UserWarning")


def test_noise_by_fisher_refuses_a_layer_that_the_batches_leave_out() -> None:
    net = nets.lora(nets.TwoExperts(), target_modules=["0", "1"]).eval()
    model = GateLoRA(net, num_data=3000)
    guide, batch = RankDiagonal(model), {"x": -torch.rand(40, 5)}
    before = guide.log_variance.detach().clone()
    with pytest.raises(ValueError, match=r"gates of \['experts.1'\] move no predicti"):
        noise_by_evidence(model, guide, [batch], noise="fisher")
    assert torch.equal(guide.log_variance, before)
    _, guide = noise_by_evidence(model, guide, [batch])
    assert guide.log_variance.isfinite().all()


class NoCurvature(lrvd.likelihoods.Categorical):
    fisher_roots = None  # type: ignore[assignment]


def test_what_has_no_evidence_is_refused_and_the_pair_stays() -> None:
    model, batch = GateLoRA(nets.perceptron(), num_data=60), nets.rows()
    guide = RankDiagonal(model)
    before = guide.log_variance.detach().clone()
    with pytest.raises(
        ValueError, match=r"got no batches; .*evidence\(model, guide, \[batch"
    ):
        noise_by_evidence(model, guide, [])
    with pytest.raises(TypeError, match=r"batches is a NoneType; .*\(model, guide, \["):
        noise_by_evidence(model, guide, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="one batch; expected several"):
        noise_by_evidence(model, guide, batch)
    with pytest.raises(TypeError, match=r"only once, .*guide, list\(batches\), ...\)"):
        noise_by_evidence(model, guide, iter([batch]))  # it is read twice
    with pytest.raises(ValueError, match='expected "scaled", "fisher" or "tied"'):
        noise_by_evidence(model, guide, [batch], noise="own")  # type: ignore[arg-type]
    with torch.no_grad():
        for side in SIDES:
            for weight in model.space.weights(side):
                weight.mul_(1e-3)
    with pytest.raises(ValueError, match="has no maximum: it rises until delta"):
        noise_by_evidence(model, guide, [batch])
    with torch.no_grad():
        for side in SIDES:
            for weight in model.space.weights(side):
                weight.zero_()
    with pytest.raises(
        ValueError, match="has no maximum: .*of the curvature is 0; train"
    ):
        noise_by_evidence(model, guide, [batch])
    assert torch.equal(guide.log_variance, before) and guide.linearized_scale == 1.0
    plain = GateLoRA(nets.perceptron(), likelihood=NoCurvature(), num_data=60)
    with pytest.raises(TypeError, match="noise by evidence needs .*fisher_roots"):
        noise_by_evidence(plain, RankDiagonal(plain), [batch])


def test_guides_and_networks_of_another_kind_are_refused() -> None:
    batch = tokens()
    horseshoe = GateLoRA(nets.bert(), prior=lrvd.priors.Horseshoe(), num_data=60)
    with pytest.raises(
        TypeError, match="over .*rank_scale.*one variance per gate: RankDiagonal on"
    ):
        noise_by_evidence(horseshoe, RankDiagonal(horseshoe), [batch])
    weights = FactorLoRA(nets.bert(), num_data=60)
    with pytest.raises(TypeError, match="guide is a TiedDiagonal; noise='fisher'"):
        noise_by_evidence(weights, TiedDiagonal(weights), [batch], noise="fisher")
    model = GateLoRA(nets.bert(), prior=lrvd.priors.Normal(), num_data=60)
    learned = RankDiagonal(model, learn_mean=True)
    with torch.no_grad():
        learned.loc.mul_(0.5)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="some gates have a mean other than 1"):
        noise_by_evidence(model, learned, [batch], noise="tied")
    dora = GateLoRA(nets.bert(use_dora=True), num_data=60)
    with pytest.raises(ValueError, match="use plain LoRA"):
        noise_by_evidence(dora, RankDiagonal(dora), [batch])
    with pytest.raises(ValueError, match="linearized_scale=0; expected a positive num"):
        RankDiagonal(model, linearized_scale=0)
    for wrong in (0.0, -1.0, float("nan"), float("inf"), None):
        with pytest.raises(ValueError, match="linearized_scale=.*; expected a positiv"):
            learned.linearized_scale = wrong  # type: ignore[assignment]
    assert learned.linearized_scale == 1.0


class Elsewhere(RankGuide):
    """A guide of weights about half of A."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.loc = nn.Parameter(0.5 * model.start()["factor"])

    def forward(self, *args: object, **batch: object) -> dict[str, Tensor]:
        return self.draw_independent({"factor": dist.Normal(self.loc, 0.01)})

    def mean(self) -> Tensor:
        return self.loc

    @property
    def log_alpha(self) -> Tensor:
        return self.space.ones() - 5


def test_tied_noise_refuses_a_guide_of_another_mean() -> None:
    model = FactorLoRA(nets.perceptron(), num_data=8)
    with pytest.raises(
        ValueError, match="Elsewhere has another mean than A and B; exp"
    ):
        noise_by_evidence(model, Elsewhere(model), [nets.rows(8)], noise="tied")


def test_numbers_that_are_not_finite_leave_the_pair_as_it_was() -> None:
    model, batch = GateLoRA(nets.perceptron(), num_data=60), nets.rows(8)
    guide = RankDiagonal(model)
    with torch.no_grad():
        guide.log_variance[0] = torch.nan
    before = guide.log_variance.detach().clone()
    with pytest.raises(ValueError, match="noise costs nan nats .*look for NaN in the"):
        noise_by_evidence(model, guide, [batch])
    torch.testing.assert_close(guide.log_variance, before, equal_nan=True)
    model.num_data = 10
    with pytest.raises(ValueError, match="num_data=10; .*num_data=len"):
        noise_by_evidence(model, guide, [batch, batch])


def test_a_part_of_the_training_set_is_told_of() -> None:
    model, batch = GateLoRA(nets.perceptron(), num_data=60), nets.rows(15)
    with pytest.warns(UserWarning, match="have 15 examples of num_data=60. Each stand"):
        noise_by_evidence(model, RankDiagonal(model), [batch])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noise_by_evidence(model, RankDiagonal(model), [batch] * 4)


class Once:
    """Batches whose second reading fails."""

    def __init__(self, batch: Any) -> None:
        self.batch, self.read = batch, False

    def __iter__(self) -> Iterator[Any]:
        if self.read:
            raise OSError("the disk is gone")
        self.read = True
        yield self.batch


def test_tied_noise_leaves_no_hooks_behind() -> None:
    model, batch = GateLoRA(nets.perceptron(), num_data=60), nets.rows(8)
    guide = RankDiagonal(model)
    before = nets.hooks(model.base_net)
    with pytest.raises(OSError, match="the disk is gone"):
        noise_by_evidence(model, guide, Once(batch), noise="tied")
    assert nets.hooks(model.base_net) == before
    drawn, rows = noise_by_evidence(model, guide, [batch], noise="tied")
    once = nets.hooks(model.base_net)
    with pytest.raises(OSError, match="the disk is gone"):
        noise_by_evidence(drawn, rows, Once(batch), noise="tied")
    again, its = noise_by_evidence(drawn, rows, [batch], noise="tied")
    assert again is drawn and nets.hooks(model.base_net) == once
    torch.testing.assert_close(its.log_variance, rows.log_variance)
    model.space.close()
    lrvd.predict(drawn, rows, [batch], method="linearized")

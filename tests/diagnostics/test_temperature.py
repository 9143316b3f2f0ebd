"""Temperature scaling finds the temperature that labels were drawn at."""

import pytest
import torch

from lrvd_pyro.diagnostics.temperature import fit_temperature


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_of_the_labels_is_found(temperature: float) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(20_000, 3)
    labels = torch.distributions.Categorical(logits=logits / temperature).sample()
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.05)
    shuffled = labels[torch.randperm(len(labels))]  # the twin: labels without logits
    with pytest.warns(UserWarning, match="T = 100 lies where its range ends"):
        assert fit_temperature(logits, shuffled) > 10


def test_of_draws_it_is_that_of_the_mean_of_their_probabilities() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(4, 20_000, 3)
    probs = (logits / 2.0).softmax(-1).mean(0)
    labels = torch.distributions.Categorical(probs=probs).sample()
    assert fit_temperature(logits, labels) == pytest.approx(2.0, rel=0.05)
    assert fit_temperature(logits.mean(0), labels) != pytest.approx(2.0, rel=0.05)


def test_log_probabilities_are_logits() -> None:
    logits = 3 * torch.randn(50, 3)
    labels = torch.distributions.Categorical(logits=logits / 2).sample()
    found = fit_temperature(logits, labels)
    assert fit_temperature(logits.log_softmax(-1), labels) == pytest.approx(found)


def test_shapes_that_do_not_fit_and_nan_are_refused() -> None:
    labels = torch.zeros(5, dtype=torch.long)
    for logits in (torch.zeros(4, 3), torch.zeros(5), torch.full((5, 3), torch.nan)):
        with pytest.raises(ValueError, match="expected n x C or S x n x C without NaN"):
            fit_temperature(logits, labels)


@pytest.mark.filterwarnings("ignore:T = 100 lies where its range ends")
def test_labels_and_logits_without_a_likelihood_are_refused() -> None:
    logits, labels = torch.zeros(3, 2), torch.tensor([0, 0, 1])
    for wrong in (torch.tensor([0, 0, 5]), torch.tensor([0, 0, -100])):
        with pytest.raises(ValueError, match=r"labels lie in .* expected 0 .. 1: leav"):
            fit_temperature(logits, wrong)
    with pytest.raises(TypeError, match=r"dtype torch.float64; .*: labels.long\(\)"):
        fit_temperature(logits, labels.double())
    with pytest.raises(ValueError, match=r"\(0, 2\); expected data that were not trai"):
        fit_temperature(logits[:0], labels[:0])
    with pytest.raises(ValueError, match=r"a logit is infinite; .*: probs.log\(\)"):
        fit_temperature(logits + torch.tensor([torch.inf, 0.0]), labels)
    excluded = logits.clone()
    excluded[2, 1] = -torch.inf
    with pytest.raises(ValueError, match="1 of 3 labels have probability 0, at any te"):
        fit_temperature(excluded, labels)
    # one draw that does not exclude it is enough
    other = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    assert fit_temperature(torch.stack([excluded, other]), labels) > 0.1


def test_a_network_that_is_always_right_is_told_of() -> None:
    logits = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    with pytest.warns(UserWarning, match="lies where its range ends, as of logits tha"):
        fit_temperature(logits, torch.tensor([0, 1]))

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
    assert fit_temperature(logits, shuffled) > 10


def test_of_draws_it_is_that_of_the_mean_of_their_probabilities() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(4, 20_000, 3)
    probs = (logits / 2.0).softmax(-1).mean(0)
    labels = torch.distributions.Categorical(probs=probs).sample()
    assert fit_temperature(logits, labels) == pytest.approx(2.0, rel=0.05)
    assert fit_temperature(logits.mean(0), labels) != pytest.approx(2.0, rel=0.05)


def test_log_probabilities_are_logits() -> None:
    logits, labels = torch.randn(50, 3), torch.arange(50) % 3
    found = fit_temperature(logits, labels)
    assert fit_temperature(logits.log_softmax(-1), labels) == pytest.approx(found)


def test_shapes_that_do_not_fit_and_nan_are_refused() -> None:
    labels = torch.zeros(5, dtype=torch.long)
    for logits in (torch.zeros(4, 3), torch.zeros(5), torch.full((5, 3), torch.nan)):
        with pytest.raises(ValueError, match="expected n x C or S x n x C without NaN"):
            fit_temperature(logits, labels)

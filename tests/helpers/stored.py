"""What the tests of storage share: bases, and pairs to save and to compare."""

import copy
from pathlib import Path
from typing import Any

import nets
import torch
from pairs import rank_guide
from peft import PeftModel
from torch import Tensor, nn

from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.predictive.predictive import posterior_mean, predict
from lrvd_pyro.storage.folder import save


def fresh(net: PeftModel) -> Any:
    """The base, as its owner would load it: with a head that knows nothing."""
    base = copy.deepcopy(net).unload()
    if hasattr(base, "classifier"):
        nn.init.normal_(base.classifier.weight)
    return base.requires_grad_(True)


def perturbed(model: Any, guide: Any = None) -> Any:
    """Every parameter that trains moved away from where it starts."""
    guide = guide or rank_guide(model)
    with torch.no_grad():
        for p in [*model.parameters(), *guide.parameters()]:
            if p.requires_grad:
                p += 0.2 * torch.randn_like(p)
    return guide


def learned(model: Any) -> RankDiagonal:
    """A guide whose means are not 1, every third of them 0."""
    guide = rank_guide(model, learn_mean=True)
    assert guide.loc is not None
    with torch.no_grad():
        guide.loc.copy_(torch.randn(len(guide.loc)))
        guide.loc[::3] = 0.0
    return guide


def predicted(model: Any, guide: Any, inputs: dict[str, Tensor]) -> Any:
    return predict(model, guide, [inputs], num_samples=3, return_samples=True)


def same_predictions(one: Any, other: Any, inputs: dict[str, Tensor]) -> None:
    ours, theirs = predicted(*one, inputs), predicted(*other, inputs)
    for name, value in vars(ours).items():
        assert torch.equal(value, getattr(theirs, name)), name


def mean_logits(model: Any, guide: Any, inputs: dict[str, Tensor]) -> Tensor:
    model.base_net.eval()
    with torch.no_grad(), posterior_mean(model, guide):
        return model.predictions(**inputs)


def plain_logits(base: nn.Module, path: Path, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = PeftModel.from_pretrained(base, path).eval()(**inputs)
    return getattr(output, "logits", output)


def saved(tmp_path: Path, **options: Any) -> tuple[Path, Any, Any]:
    """A saved GateLoRA on BERT."""
    model = GateLoRA(nets.bert(), num_data=60, **options)
    guide = perturbed(model)
    return save(tmp_path / "run", model, guide), model, guide

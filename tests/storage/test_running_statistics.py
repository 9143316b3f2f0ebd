"""What training moves beside parameters is stored, or refused by name."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pyro.infer import SVI
from safetensors.torch import load_file, save_file
from stored import mean_logits, plain_logits, same_predictions
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.storage.export import export_peft
from lrvd_pyro.storage.folder import load, save
from lrvd_pyro.storage.hashes import seal

MOVED = "training moved norm.running_mean, .* \\(3 buffers\\)"


class Normalized(nn.Module):
    """Two linear layers with a batch normalization between them."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm = nn.Linear(5, 6), nn.BatchNorm1d(6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.hidden(x)).relu())


def base() -> Normalized:
    """The same at each call."""
    torch.manual_seed(7)
    return Normalized()


def resnet() -> Any:
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float32)  # of the files that it is loaded from
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    config = ResNetConfig(**sizes, layer_type="basic", num_labels=3)
    return ResNetForImageClassification(config)


def trained(
    net: nn.Module, batch: Any, *, evaluating: bool = False, **options: Any
) -> Any:
    """A pair after three steps."""
    config: dict[str, Any] = {"r": 2, "target_modules": ["hidden", "out"]} | options
    net = get_peft_model(net, LoraConfig(**config)).train(not evaluating)
    model = GateLoRA(net, num_data=60)
    guide = RankDiagonal(model)
    svi = SVI(model, guide, lrvd.optim.AdamW(lr=3e-2), lrvd.RankELBO(noise="batch"))
    for _ in range(3):
        svi.step(**batch)
    net.eval()
    return model, guide


def rows() -> Any:
    return {"x": 3 * torch.randn(8, 5) + 1, "labels": torch.arange(8) % 3}


def images() -> Any:
    pixels = 3 * torch.randn(8, 3, 16, 16, dtype=torch.float32) + 2
    return {"pixel_values": pixels, "labels": torch.arange(8) % 3}


def without_labels(batch: Any) -> Any:
    return {name: value for name, value in batch.items() if name != "labels"}


def saved(path: Path, pair: Any) -> Path:
    with pytest.warns(UserWarning, match=f"{MOVED} of the base: .*load restores"):
        return save(path / "run", *pair)


def test_running_statistics_come_back_bit_for_bit(tmp_path: Path) -> None:
    batch = rows()
    pair = trained(base(), batch)
    path = saved(tmp_path, pair)
    assert (pair[0].base_net.base_model.model.norm.running_mean != 0).all()
    loaded = load(path, base())
    same_predictions(pair, loaded, without_labels(batch))
    again = load(saved(tmp_path, loaded), copy.deepcopy(pair[0].base_net).unload())
    same_predictions(pair, again, without_labels(batch))
    with pytest.raises(ValueError, match=MOVED):
        export_peft(tmp_path / "out", *loaded)


@pytest.mark.parametrize("mode", ["pruned", "padded"])
def test_an_adapter_without_running_statistics_is_refused(
    mode: Any, tmp_path: Path
) -> None:
    batch = rows()
    pair = trained(base(), batch)
    with pytest.raises(ValueError, match=f'{MOVED} .*mode="merged".*net.eval.*to_save'):
        export_peft(tmp_path / "out", *pair, mode=mode, probe=batch)
    assert not list(tmp_path.iterdir())


def test_those_of_a_network_of_transformers_come_back(tmp_path: Path) -> None:
    batch = images()
    modules = {"target_modules": ["convolution"], "modules_to_save": ["classifier"]}
    pair = trained(resnet(), batch, **modules)
    with pytest.warns(UserWarning, match="18 buffers"):
        path = save(tmp_path / "run", *pair)
    same_predictions(pair, load(path, resnet()), without_labels(batch))


def test_a_merged_network_has_the_running_statistics(tmp_path: Path) -> None:
    batch = images()
    modules = {"target_modules": ["convolution"], "modules_to_save": ["classifier"]}
    pair = trained(resnet(), batch, **modules)
    with pytest.raises(ValueError, match=r"normalization.running_mean.*18 buffers"):
        export_peft(tmp_path / "out", *pair)
    export_peft(tmp_path / "out", *pair, mode="merged", probe=batch)
    net = type(resnet()).from_pretrained(tmp_path / "out").eval()
    inputs = without_labels(batch)
    with torch.no_grad():
        found = net(**inputs).logits
    torch.testing.assert_close(found, mean_logits(*pair, inputs))


def test_statistics_at_rest_or_in_the_adapter_are_served_by_peft(
    tmp_path: Path,
) -> None:
    batch, inputs = (whole := rows()), without_labels(whole)
    resting = trained(base(), batch, evaluating=True)
    within = trained(base(), batch, modules_to_save=["norm"])
    for name, pair in {"resting": resting, "within": within}.items():
        export_peft(tmp_path / name, *pair, probe=batch)
        path = save(tmp_path / f"{name} run", *pair)
        same_predictions(pair, load(path, base()), inputs)
        expected = mean_logits(*pair, inputs)
        for folder in (tmp_path / name, path):
            torch.testing.assert_close(plain_logits(base(), folder, inputs), expected)
    norm = within[0].base_net.base_model.model.norm.modules_to_save["default"]
    assert (norm.running_mean != 0).all()


def test_restored_statistics_have_the_precision_of_the_base(tmp_path: Path) -> None:
    path = saved(tmp_path, trained(base(), rows()))
    model, _ = load(path, base().float())
    norm = model.base_net.base_model.model.norm
    assert norm.running_mean.dtype == torch.float32 and norm.running_mean.any()


def test_a_folder_of_an_earlier_version_leaves_the_statistics(tmp_path: Path) -> None:
    path = saved(tmp_path, trained(base(), rows()))
    file = path / "lrvd_posterior.safetensors"
    tensors = load_file(file)
    kept = {n: t for n, t in tensors.items() if not n.startswith("base.")}
    assert len(kept) == len(tensors) - 3
    save_file(kept, file)
    seal(path)
    with pytest.raises(ValueError, match="not those of its config: base.norm"):
        load(path, base())
    config = json.loads((path / "lrvd_config.json").read_text())
    older = {n: v for n, v in config.items() if "hash" not in n} | {"format": 2}
    (path / "lrvd_config.json").write_text(json.dumps(older))
    with pytest.warns(UserWarning, match="without hashes"):
        model, _ = load(path, base())
    assert not model.base_net.base_model.model.norm.running_mean.any()


def test_statistics_that_the_base_lacks_are_refused_or_left_out(tmp_path: Path) -> None:
    path = saved(tmp_path, trained(base(), rows()))
    other = base()
    other.norm = nn.BatchNorm1d(6, track_running_stats=False)
    with pytest.raises(ValueError, match="base.norm.running_mean is one too many"):
        load(path, other)
    load(path, other, check_base=False)

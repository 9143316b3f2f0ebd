"""Freeing the lower layers: what goes, and what it saves."""

from typing import Any

import nets
import pytest
import torch
from pyro.infer import SVI
from torch import Tensor

from lrvd_pyro import RankELBO, free_lower_layers
from lrvd_pyro.gauge import BalanceSchedule, gramians, hankel_values
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.optim import AdamW

LAYERS = 4
Pair = tuple[GateLoRA, RankDiagonal]


def pair(**config: Any) -> Pair:
    """A BERT of four layers with 2 modules of rank 4 each, and its guide."""
    model = GateLoRA(nets.bert(layers=LAYERS, **config), num_data=60)
    return model, RankDiagonal(model)


def sizes(model: GateLoRA, *shares: float) -> dict[str, Tensor]:
    """Hankel values of which each layer holds a given share of the squares."""
    layers = [int(name.split(".layer.")[1][0]) for name in model.space.modules]
    return {
        name: torch.full((r,), (shares[layer] / 8) ** 0.5)
        for name, r, layer in zip(model.space.modules, model.space.ranks, layers)
    }


@pytest.mark.parametrize(
    ("share", "freed"), [(0.0, 0), (0.09, 0), (0.11, 1), (0.31, 2), (0.99, 3)]
)
def test_the_lowest_layers_go_that_hold_at_most_the_share(share, freed):
    model, guide = pair()
    keep = free_lower_layers(
        model, guide, hankel_values=sizes(model, 0.1, 0.2, 0.3, 0.4), share=share
    )
    assert keep.tolist() == [i >= 8 * freed for i in range(8 * LAYERS)]
    assert min(model.space.coordinates["layer"]) == freed


def test_a_given_number_of_layers_goes_whatever_they_hold():
    model, guide = pair()
    for layers, left in ((0, 4), (2, 2), (1, 1)):
        free_lower_layers(model, guide, layers=layers)
        assert len(set(model.space.coordinates["layer"])) == left
    for wrong in (-1, 0.5, 1):
        with pytest.raises(ValueError, match="expected 0 to 0: 1 layers have ranks"):
            free_lower_layers(model, guide, layers=wrong)  # type: ignore[arg-type]


def test_a_small_layer_above_a_large_one_stays():
    model, guide = pair()
    assert free_lower_layers(
        model, guide, hankel_values=sizes(model, 0.5, 0.01, 0.01, 0.48)
    ).all()


def test_the_highest_layer_stays_though_it_holds_nothing():
    model, guide = pair()
    free_lower_layers(
        model, guide, hankel_values=sizes(model, 0.0, 0.0, 0.0, 0.0) | top(model)
    )
    assert set(model.space.coordinates["layer"]) == {LAYERS - 1}


def top(model: GateLoRA) -> dict[str, Tensor]:
    """A value for one module of the highest layer, the other one's being 0."""
    return {model.space.modules[-1]: torch.ones(4)}


def test_a_module_without_a_layer_number_stays():
    model, guide = pair(target_modules=["value", "pooler.dense"])
    found = {name: torch.full((4,), 1e-6) for name in model.space.modules}
    pooler = next(name for name in found if "pooler" in name)
    found[pooler] = torch.ones(4)
    free_lower_layers(model, guide, hankel_values=found)
    assert model.space.modules == (pooler,)


def test_freed_layers_save_nothing_and_the_function_is_that_of_gates_at_0():
    model, guide = pair()
    batch = nets.tokens()
    gate = torch.tensor(model.space.coordinates["layer"]) >= 2
    with torch.no_grad(), model.space.bind(gate.double()):
        expected = model.base_net(**batch).logits
    before = saved_in(model, batch)
    free_lower_layers(model, guide, hankel_values=sizes(model, 0.1, 0.1, 0.4, 0.4))
    torch.testing.assert_close(model.base_net(**batch).logits, expected)
    assert [n > 0 for n in before] == [True] * LAYERS
    assert [n > 0 for n in saved_in(model, batch)] == [False, False, True, True]


def saved_in(model: GateLoRA, batch: dict[str, Tensor]) -> list[int]:
    """How many tensors each layer's forward pass saves for backward."""
    layers: Any = model.base_net.base_model.model.bert.encoder.layer
    counts, here = [0] * LAYERS, [-1]
    handles = [
        layer.register_forward_pre_hook(lambda *_, i=i: here.__setitem__(0, i))
        for i, layer in enumerate(layers)
    ]
    handles.append(layers[-1].register_forward_hook(lambda *_: here.__setitem__(0, -1)))

    def pack(tensor: Tensor) -> Tensor:
        if here[0] >= 0:
            counts[here[0]] += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_net(**batch)
    for handle in handles:
        handle.remove()
    return counts


def test_training_goes_on_in_the_layers_that_stay():
    model, guide = pair()
    batches = [nets.tokens() for _ in range(3)]
    optim = AdamW(lr=1e-2)
    svi = SVI(model, guide, optim, loss=RankELBO())
    gather = BalanceSchedule(model, guide, optim, every=10, gather_every=1)
    for batch in batches:
        svi.step(**batch)
        gather.step()
    found = hankel_values(gather.gramians())
    gather.close()
    gather.step()
    assert not model._forward_pre_hooks
    lower = [t.square().sum() for t in found.values()][: 2 * (LAYERS - 1)]
    share = float(sum(lower) / sum(t.square().sum() for t in found.values()))
    free_lower_layers(model, guide, optim, hankel_values=found, share=share + 1e-6)
    weights = [*model.space.weights("lora_A"), *model.space.weights("lora_B")]
    before = [w.detach().clone() for w in weights]
    for batch in batches:
        svi.step(**batch)
    assert len(weights) == 4
    assert all(bool((w != old).any()) for w, old in zip(weights, before))


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    model, guide = pair()
    with pytest.raises(ValueError, match=r"share=.*expected a number from 0 to below"):
        free_lower_layers(
            model, guide, hankel_values=sizes(model, 1, 1, 1, 1), share=share
        )


def test_values_of_other_ranks_are_refused():
    model, guide = pair()
    values = sizes(model, 1, 1, 1, 1)
    values[model.space.modules[0]] = torch.ones(3)
    with pytest.raises(ValueError, match="other LoRA modules or ranks"):
        free_lower_layers(model, guide, hankel_values=values)


def test_an_adapter_that_has_not_trained_is_refused():
    model, guide = pair(randomize=False)
    found = hankel_values(gramians(model, [nets.tokens()]))
    for values in (found, {name: t * torch.nan for name, t in found.items()}):
        with pytest.raises(ValueError, match="no module's B has moved yet; train"):
            free_lower_layers(model, guide, hankel_values=values)
    assert len(model.space.modules) == 2 * LAYERS


def test_gramians_in_place_of_their_values_are_refused():
    model, guide = pair()
    second_moments: Any = gramians(model, [nets.tokens()])
    with pytest.raises(TypeError, match="of type Gramians; expected t by module"):
        free_lower_layers(model, guide, hankel_values=second_moments)


def test_dora_is_refused():
    model, guide = pair(use_dora=True)
    with pytest.raises(TypeError, match="cannot be left without a rank"):
        free_lower_layers(model, guide, hankel_values=sizes(model, 1, 1, 1, 1))

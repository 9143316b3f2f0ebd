"""Which batches the check of rows looks at, in which order, and what it remembers."""

from typing import Any

import mixed
import nets
import pytest
import torch
from torch import Tensor, nn

import lrvd_pyro as lrvd


class Gated(mixed.TimeFirst):
    """A branch behind a factor that starts at 0, as ReZero and LayerScale have it."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.factor = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * super().forward(x) + x.mean(1)[:, :3]


def gated_model() -> tuple[Any, dict[str, Tensor]]:
    net = nets.lora(Gated(), target_modules=["layer"])
    batch = {"x": torch.randn(4, 4, 5), "labels": torch.tensor([0, 1, 2, 0])}
    return lrvd.models.GateLoRA(net, num_data=4), batch


def test_a_branch_that_moves_nothing_yet_is_looked_at_again() -> None:
    model, batch = gated_model()
    assert model.mixed_rows(batch) == ""
    with torch.no_grad():
        model.base_net.get_base_model().factor.fill_(1.0)
    assert "LoRA layer 'layer'" in model.mixed_rows(batch)


class Sorted(nn.Module):
    """Sorts the examples by length, and leaves them sorted for the LoRA layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        order = lengths.argsort(descending=True)
        return self.layer(x[order])[order.argsort()]


@pytest.mark.parametrize(
    "lengths", [[2, 1], [1, 2], [3, 2, 1], [3, 2, 4], [4, 3, 2, 1]]
)
def test_a_network_that_sorts_shows_it_on_a_batch_of_any_order(lengths: Any) -> None:
    net = nets.lora(Sorted(), target_modules=["layer"])
    model = lrvd.models.GateLoRA(net, num_data=6)
    x = torch.randn(len(lengths), 5)
    before = x.clone()
    reason = model.mixed_rows({"x": x, "lengths": torch.tensor(lengths)})
    assert "LoRA layer 'layer'" in reason and torch.equal(x, before)


class Packed(nn.Module):
    """Takes batches from the longest example to the shortest, and no other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        pack, unpack = (
            nn.utils.rnn.pack_padded_sequence,
            nn.utils.rnn.pad_packed_sequence,
        )
        x, _ = unpack(pack(x, lengths, batch_first=True), batch_first=True)
        return self.layer(x.sum(1))


class Mapped(nn.Module):
    """Tensors within a mapping, and a list beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Any, lengths: Any = None) -> Tensor:
        assert lengths is None or lengths == x["mask"].sum(1).tolist()
        return self.layer(x["ids"])


@pytest.mark.parametrize("case", ["packed", "mapped", "list", "words"])
def test_inputs_that_bear_no_other_order_are_checked_in_their_own(case: str) -> None:
    ids, mask = torch.randn(3, 5), torch.ones(3, 4).tril(1)
    x = {"ids": ids, "mask": mask}
    batch: dict[str, Any]
    batch = {
        "packed": {"x": torch.randn(3, 4, 5), "lengths": torch.tensor([4, 3, 1])},
        "mapped": {"x": x},
        "list": {"x": x, "lengths": mask.sum(1).tolist()},
        "words": {"x": {"ids": ids.to_sparse()}},
    }[case]
    net = nets.lora(
        Packed() if case == "packed" else Mapped(), target_modules=["layer"]
    )
    model = lrvd.models.GateLoRA(net, num_data=3)
    batch["labels"] = torch.tensor([0, 1, 2])
    assert model.mixed_rows(batch) == ""


def test_examples_keep_their_order_where_a_tensor_has_no_row_for_each() -> None:
    """A second tensor of patches, say, would no longer belong to them."""

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, counts: Tensor, patches: Tensor) -> Tensor:
            assert counts.tolist() == [1, 2, 3]
            sums = [part.sum(0) for part in patches.split(counts.tolist())]
            return self.layer(torch.stack(sums))

    net = nets.lora(Patches(), target_modules=["layer"])
    model = lrvd.models.GateLoRA(net, num_data=3)
    batch = {"counts": torch.tensor([1, 2, 3]), "patches": torch.randn(6, 5)}
    assert model.mixed_rows(batch) == ""


@pytest.mark.parametrize(
    "later", [{"time_first": True}, {"x": torch.randn(4, 2, 2, 5)}]
)
def test_other_options_and_dimensions_are_a_setting_of_their_own(later: Any) -> None:
    model = lrvd.models.GateLoRA(
        nets.lora(mixed.Either(), target_modules=["layer"]), num_data=4
    )
    first = {"x": torch.randn(4, 4, 5), "time_first": False}
    assert model.mixed_rows(first) == ""
    changed = {k: v.double() if isinstance(v, Tensor) else v for k, v in later.items()}
    assert "LoRA layer 'layer'" in model.mixed_rows(first | changed)


def test_batch_normalization_thawed_later_is_a_setting_of_its_own() -> None:
    class Normed(mixed.Either):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor, time_first: bool = False) -> Tensor:
            return self.norm(super().forward(x))

    net = nets.lora(Normed(), target_modules=["layer"])
    model, batch = lrvd.models.GateLoRA(net, num_data=4), {"x": torch.randn(4, 4, 5)}
    norm = net.get_base_model().norm
    norm.eval()
    assert model.mixed_rows(batch) == ""
    norm.train()
    assert "batch normalization" in model.mixed_rows(batch)

"""A shuffled order that can be left and taken up again."""

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lrvd_pyro.training.sampler import ResumableSampler

N = 10
ORDER = [4, 2, 5, 3, 1, 0]


def test_each_epoch_has_every_index_once_in_its_own_order() -> None:
    sampler = ResumableSampler(N, seed=1)
    epochs = [[*sampler] for _ in range(3)]
    assert all(sorted(epoch) == [*range(N)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] == [*ResumableSampler(N, seed=1)]
    others = [[*ResumableSampler(N, seed=seed)] for seed in (0, 2)]
    assert not any(other in epochs for other in others)
    assert len(sampler) == N and (sampler.epoch, sampler.position) == (3, 0)


def test_the_order_stays_what_it_is_in_every_version() -> None:
    assert [*ResumableSampler(6, seed=5)] == ORDER


def test_batches_are_the_same_order_cut() -> None:
    batches = [*ResumableSampler(N).batches(4)]
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert torch.cat(batches).tolist() == [*ResumableSampler(N)]


@pytest.mark.parametrize("taken", [0, 1, 9, 10, 11, 25])
def test_a_restored_sampler_goes_on_at_the_next_index(taken: int) -> None:
    def indices(sampler: ResumableSampler, count: int) -> list[int]:
        found: list[int] = []
        while len(found) < count:
            for index in sampler:
                found.append(index)
                if len(found) == count:
                    break
        return found

    whole = indices(ResumableSampler(N, seed=3), 40)
    left = ResumableSampler(N, seed=3)
    indices(left, taken)
    fresh = ResumableSampler(N, seed=3)
    fresh.load_state_dict(left.state_dict())
    assert fresh.position == taken % N
    assert indices(fresh, 40 - taken) == whole[taken:]


def test_it_draws_from_no_global_generator() -> None:
    before = torch.get_rng_state()
    assert len([*ResumableSampler(N)]) == N
    assert torch.equal(torch.get_rng_state(), before)


def noise_after_a_resume(generator: Any) -> list[Any]:
    """Batches with noise, without and with a new loader after the first batch."""
    dataset = TensorDataset(torch.arange(N))
    found = []
    for pause in (False, True):
        torch.manual_seed(0)
        sampler = ResumableSampler(N)
        options = {"sampler": sampler, "generator": generator and generator()}
        batches = iter(DataLoader(dataset, 3, **options))
        seen = [(next(batches)[0].tolist(), torch.rand(()).item())]
        if pause:
            batches = iter(DataLoader(dataset, 3, **options))
        seen += [(batch.tolist(), torch.rand(()).item()) for (batch,) in batches]
        found.append(seen)
    return found


def test_a_loader_with_a_generator_of_its_own_goes_on() -> None:
    whole, resumed = noise_after_a_resume(torch.Generator)
    assert resumed == whole and len(whole) == 4


def test_a_loader_without_one_draws_other_noise() -> None:
    whole, resumed = noise_after_a_resume(None)
    assert resumed != whole
    assert [index for index, _ in resumed] == [index for index, _ in whole]


def test_workers_run_ahead_and_seek_mends_it() -> None:
    sampler = ResumableSampler(64)
    dataset = TensorDataset(torch.arange(64))
    loader = DataLoader(dataset, 4, sampler=sampler, num_workers=1)
    batches = iter(loader)
    trained = [next(batches)[0], next(batches)[0]]
    assert sampler.position > 8
    sampler.seek(0, 8)
    rest = [*sampler.batches(4)]
    assert torch.cat(trained + rest).tolist() == [*ResumableSampler(64)]


@pytest.mark.parametrize(
    ("n", "seed"), [(0, 0), (5, -1), (2.5, 0), (5, None), ([1, 2], 0)]
)
def test_what_is_no_size_or_seed_is_refused(n: Any, seed: Any) -> None:
    with pytest.raises(ValueError, match=r"n=.*, seed=.*ResumableSampler\(len\(train"):
        ResumableSampler(n, seed)


@pytest.mark.parametrize(("epoch", "position"), [(-1, 0), (0, -1), (0, N + 1)])
def test_a_place_that_is_none_is_refused(epoch: int, position: int) -> None:
    with pytest.raises(ValueError, match=f"epoch={epoch}, position={position}; .*n=10"):
        ResumableSampler(N).seek(epoch, position)


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size=0; .*batches\(32\)"):
        ResumableSampler(N).batches(0)


@pytest.mark.parametrize(("n", "seed"), [(N + 1, 0), (N, 1)])
def test_the_state_of_another_sampler_is_refused(n: int, seed: int) -> None:
    sampler = ResumableSampler(N)
    sampler.seek(1, 2)
    other = ResumableSampler(n, seed).state_dict()
    with pytest.raises(ValueError, match=rf"saved sampler has n={n}, seed={seed} and"):
        sampler.load_state_dict(other)
    assert (sampler.epoch, sampler.position) == (1, 2)

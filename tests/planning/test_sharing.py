"""A layer's heads spread over processes: their plans together are the plan of one process."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_diffusers.planning import budget, sharing
from psa_diffusers.planning.budget import Limits, spend, step_prices

BLOCK = 16


class Ranks:
    """Threads in place of processes: they exchange tensors as a process group does."""

    def __init__(self, ranks):
        self.given, self.barrier, self.local = [None] * ranks, threading.Barrier(ranks, timeout=60), threading.local()

    def run(self, work):
        def one(rank):
            self.local.rank = rank
            return work(rank)

        with ThreadPoolExecutor(len(self.given)) as threads:
            return list(threads.map(one, range(len(self.given))))

    def gather(self, counts, group):
        assert group is self
        self.given[self.local.rank] = counts
        self.barrier.wait()
        every = torch.stack(self.given)
        self.barrier.wait()
        return every, self.local.rank


def random_prices(batch, heads, query_blocks, kv_blocks, coarse, cap, generator):
    """Coarse errors: most steps have one of a few prices, so that the last bin reaches over many heads."""
    errors = torch.rand(3, batch, heads, query_blocks, kv_blocks, generator=generator).cumsum(0)
    errors = (errors * coarse).round() / coarse
    return step_prices(errors, BLOCK, cap)


@pytest.fixture(autouse=True)
def threads_for_processes(monkeypatch):
    monkeypatch.setattr(budget, "gather_ranks", lambda counts, group: group.gather(counts, group))


@given(
    st.integers(0, 10_000),
    st.lists(st.integers(1, 3), min_size=1, max_size=4),
    st.sampled_from([1 / BLOCK, 0.1, 0.15, 0.3, 0.7, 1.0]),
    st.sampled_from([1, 2, 30, 10_000]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_shares_together_are_the_plan_of_one_process(seed, heads, compute_budget, coarse, limited):
    generator = torch.Generator().manual_seed(seed)
    batch, query_blocks, kv_blocks = 2, 3, 7
    cap = counted = full = None
    if limited:
        cap = torch.randint(1, 4, (batch, sum(heads), kv_blocks), generator=generator).to(torch.int8)
        counted = torch.rand(batch, kv_blocks, generator=generator) < 0.8
        full = torch.rand(query_blocks, kv_blocks, generator=generator) < 0.1
    prices = random_prices(batch, sum(heads), query_blocks, kv_blocks, coarse, cap, generator)
    whole = spend(prices, compute_budget, BLOCK, Limits(cap, counted, full))
    ranks, ends = Ranks(len(heads)), torch.tensor(heads).cumsum(0).tolist()

    def share(rank):
        own = slice(ends[rank] - heads[rank], ends[rank])
        limits = Limits(None if cap is None else cap[:, own], counted, full)
        return spend(prices[:, :, own], compute_budget, BLOCK, limits, ranks)

    assert torch.equal(torch.cat(ranks.run(share), dim=1), whole)


@pytest.mark.parametrize("target_error", [0.05, 0.5, torch.tensor([0.1, 0.8])])
@pytest.mark.parametrize("heads", [[2, 2], [1, 3, 2]])
def test_shares_meet_a_target_error_together(heads, target_error):
    prices = random_prices(2, sum(heads), 3, 7, 30, None, torch.Generator().manual_seed(0))
    full = torch.zeros(3, 7, dtype=torch.bool)
    full[2] = True
    whole = spend(prices, None, BLOCK, Limits(full=full), target_error=target_error)
    assert 1 < whole.double().mean() < 4
    ranks, ends = Ranks(len(heads)), torch.tensor(heads).cumsum(0).tolist()

    def share(rank):
        own = prices[:, :, ends[rank] - heads[rank] : ends[rank]]
        return spend(own, None, BLOCK, Limits(full=full), ranks, target_error=target_error)

    assert torch.equal(torch.cat(ranks.run(share), dim=1), whole)


@pytest.mark.parametrize("target_error", [0.2, 0.5])
def test_rows_that_are_full_anyway_have_no_say_in_a_target_error(target_error):
    prices = random_prices(1, 2, 3, 7, 30, None, torch.Generator().manual_seed(0))
    full = torch.zeros(3, 7, dtype=torch.bool)
    full[2] = True
    levels = spend(prices, None, BLOCK, Limits(full=full), target_error=target_error)
    alone = spend(prices[:, :, :, :2], None, BLOCK, Limits(), target_error=target_error)
    assert torch.equal(levels[:, :, :2], alone) and (levels[:, :, 2] == 1).all()
    assert 1 < alone.double().mean() < 4


def test_the_last_bin_is_filled_from_the_lowest_rank():
    """All pairs are worth the same: the budget lasts for the first head, and half of the second."""
    prices = torch.full((1, 1, 4, 2, 4), 20_000, dtype=torch.int16)  # one step, from the centroid to level 1
    compute_budget = (1.5 / 4) + (2.5 / 4) / BLOCK
    ranks = Ranks(2)
    shares = ranks.run(lambda rank: spend(prices[:, :, :2], compute_budget, BLOCK, Limits(), ranks))
    assert torch.equal(torch.cat(shares, dim=1), spend(prices, compute_budget, BLOCK, Limits()))
    assert (shares[0][0, 0] == 1).all() and (shares[0][0, 1] == 1).sum() == 4 and (shares[1] == 2).all()


def test_a_mean_over_uneven_heads(monkeypatch):
    group = object()

    def all_reduce(sums, group):
        sums += torch.tensor([0.5 * 1, 1.0], dtype=torch.float64)  # the other process: one head, of mean cost 0.5

    monkeypatch.setattr(sharing.dist, "all_reduce", all_reduce)
    assert float(sharing.mean_over_heads(torch.tensor(0.2, dtype=torch.float64), 2, group)) == pytest.approx(0.3)

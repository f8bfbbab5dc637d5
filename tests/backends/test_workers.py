"""Work shared out among threads: done once each, in few slots, and errors come through."""

import threading
import time
from functools import partial

import pytest
import torch

from psa_diffusers.backends.workers import MOST_PREPARED, run_groups


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_piece_once_and_slots_not_shared(workers):
    done, open_groups, most = [], {}, 0
    lock = threading.Lock()

    def prepare(group, slot):
        with lock:
            assert slot not in open_groups
            if group % 3:
                open_groups[slot] = group % 3
        return [(group, piece, slot) for piece in range(group % 3)]

    def work(piece):
        nonlocal most
        with lock:
            most = max(most, len(open_groups))
            done.append(piece[:2])
            open_groups[piece[2]] -= 1
            if not open_groups[piece[2]]:
                del open_groups[piece[2]]

    finished = []

    def finish(group, slot):
        with lock:
            assert slot not in open_groups
            finished.append(group)
            assert sum(piece[0] == group for piece in done) == group % 3

    run_groups(range(50), ["a", "b"], prepare, work, finish, workers)
    assert sorted(finished) == list(range(50))
    assert sorted(done) == [(group, piece) for group in range(50) for piece in range(group % 3)]
    assert most <= 2


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("place", ["prepare", "work", "finish"])
def test_errors_come_through(workers, place):
    def step(*arguments, name):
        if name == place and arguments[0] == 2:
            raise RuntimeError(f"in {name}")
        return [arguments[0]]

    with pytest.raises(RuntimeError, match=f"in {place}"):
        steps = (partial(step, name=name) for name in ("prepare", "work", "finish"))
        run_groups(range(5), [None], *steps, workers)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_few_groups_are_prepared_at_a_time(workers):
    preparing, most = [], 0

    def prepare(group, slot):
        nonlocal most
        preparing.append(group)
        most = max(most, len(preparing))
        time.sleep(0.01)  # long enough for the others to begin, were they allowed to
        preparing.remove(group)
        return [group]

    done = []
    run_groups(range(12), list("abcdefgh"), prepare, done.append, lambda group, slot: None, workers)
    assert sorted(done) == list(range(12))
    assert most == min(workers, MOST_PREPARED)


def test_the_callers_thread_count_stays():
    before = torch.get_num_threads()
    counts = []

    def count(*arguments):
        counts.append(torch.get_num_threads())
        return [None]

    run_groups(range(8), [0, 1], count, count, count, 2)
    assert torch.get_num_threads() == before
    assert set(counts) == {max(1, before // 2)}

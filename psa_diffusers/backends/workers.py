"""Threads that share out small pieces of work, each with operators that run in one thread."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Generic, TypeVar

import torch

Group = TypeVar("Group")
Slot = TypeVar("Slot")
Piece = TypeVar("Piece")

# Python itself runs one thread at a time: beyond this many, workers wait for it, and get several cores each instead.
MAX_WORKERS = 16
# To prepare is many short operators, after each of which a thread waits for Python: with four threads at it, each was
# measured to take nine times as long, and four times the processor's time, as with one or two.
MOST_PREPARED = 2


def thread_count(device: torch.device) -> int:
    """Workers that :func:`run_groups` has for tensors on this device: a GPU needs no more than one to launch from."""
    return min(torch.get_num_threads(), MAX_WORKERS) if device.type == "cpu" else 1


def run_groups(
    groups: Iterable[Group],
    slots: Sequence[Slot],
    prepare: Callable[[Group, Slot], list[Piece]],
    work: Callable[[Piece], None],
    finish: Callable[[Group, Slot], None],
    workers: int,
) -> None:
    """Call ``work`` on every piece that ``prepare`` makes of every group, on that many threads.

    A slot is the memory that a group lives in: ``prepare`` gets a free one, ``finish`` the same when the last piece of
    its group is done, and then it is free again. MOST_PREPARED groups are prepared at a time. Pieces are begun in their
    order. The first error is raised here, once the other threads ended.
    """
    queue = _Queue(groups, slots, prepare, work, finish)
    if workers <= 1:
        queue.drain()
        return
    inference = torch.is_inference_mode_enabled()

    def drain() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            queue.drain()

    pool = _pool(workers, max(1, torch.get_num_threads() // workers), os.getpid())
    jobs = [pool.submit(drain) for _ in range(workers)]
    for error in [job.exception() for job in jobs]:
        if error is not None:
            raise error


class _Queue(Generic[Group, Slot, Piece]):
    """What is left to do: pieces first, and where there are none, a group for every free slot."""

    def __init__(
        self,
        groups: Iterable[Group],
        slots: Sequence[Slot],
        prepare: Callable[[Group, Slot], list[Piece]],
        work: Callable[[Piece], None],
        finish: Callable[[Group, Slot], None],
    ) -> None:
        self.groups, self.prepare, self.work, self.finish = deque(groups), prepare, work, finish
        self.slots, self.free = slots, deque(range(len(slots)))
        self.pieces: deque[tuple[int, Piece]] = deque()
        self.held: list[Group | None] = [None] * len(slots)  # the group in each slot
        self.unfinished = [0] * len(slots)
        self.preparing = 0
        self.failed = False
        self.changed = threading.Condition()

    def drain(self) -> None:
        """Take part until nothing is left."""
        try:
            while (task := self._take()) is not None:
                task()
        except BaseException:
            with self.changed:
                self.failed = True
                self.changed.notify_all()
            raise

    def _take(self) -> Callable[[], None] | None:
        with self.changed:
            while not self.failed:
                if self.pieces:
                    return partial(self._work, *self.pieces.popleft())
                if not self.groups and not self.preparing:
                    return None
                if self.groups and self.free and self.preparing < MOST_PREPARED:
                    self.preparing += 1
                    return partial(self._prepare, self.groups.popleft(), self.free.popleft())
                self.changed.wait()
        return None

    def _work(self, slot: int, piece: Piece) -> None:
        self.work(piece)
        with self.changed:
            self.unfinished[slot] -= 1
            last = self.unfinished[slot] == 0
        if last:
            self._finish(slot)

    def _prepare(self, group: Group, slot: int) -> None:
        pieces = self.prepare(group, self.slots[slot])
        with self.changed:
            self.preparing -= 1
            self.held[slot], self.unfinished[slot] = group, len(pieces)
            self.pieces.extend((slot, piece) for piece in pieces)
            self.changed.notify_all()
        if not pieces:
            self._finish(slot)

    def _finish(self, slot: int) -> None:
        self.finish(self.held[slot], self.slots[slot])
        with self.changed:
            self.free.append(slot)
            self.changed.notify_all()


@lru_cache(maxsize=4)
def _pool(workers: int, threads_each: int, process: int) -> ThreadPoolExecutor:
    """Threads whose operators use ``threads_each`` threads; a pool for every process, as a fork does not copy threads.

    To set the number also touches what other threads use (MKL), so that it is put back at once.
    """
    before = torch.get_num_threads()
    ready = threading.Barrier(workers + 1)

    def start() -> None:
        try:
            torch.get_num_threads()  # a thread's first call takes the process's number over; not to come later
            torch.set_num_threads(threads_each)
        finally:
            ready.wait()

    pool = ThreadPoolExecutor(workers, thread_name_prefix="psa", initializer=start)
    for _ in range(workers):
        pool.submit(lambda: None)
    ready.wait()
    torch.set_num_threads(before)
    return pool

"""Threads that share out small pieces of work, each with operators that run in one thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

Group = TypeVar("Group")
Piece = TypeVar("Piece")

# Python itself runs one thread at a time: beyond this many, workers wait for it, and get several cores each instead.
MAX_WORKERS = 16


def run_groups(
    groups: Iterable[Group],
    prepare: Callable[[Group], list[Piece]],
    work: Callable[[Piece], None],
    *,
    parallel: bool = True,
) -> None:
    """Call ``work`` on every piece that ``prepare`` makes of every group, on as many threads as torch uses.

    A group is prepared when no piece is left to work on, so that few groups are in memory at a time. Pieces of a group
    are begun in their order. The first error of a piece is raised here, when the other threads have ended.
    """
    threads = torch.get_num_threads() if parallel else 1
    queue = _Queue(groups, prepare, work)
    workers = min(threads, MAX_WORKERS)
    if workers <= 1:
        queue.drain()
        return
    inference = torch.is_inference_mode_enabled()

    def drain() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            queue.drain()

    jobs = [_pool(workers, threads // workers).submit(drain) for _ in range(workers)]
    errors = [job.exception() for job in jobs]
    for error in errors:
        if error is not None:
            raise error


class _Queue:
    def __init__(
        self, groups: Iterable[Group], prepare: Callable[[Group], list[Piece]], work: Callable[[Piece], None]
    ) -> None:
        self.groups, self.prepare, self.work = iter(groups), prepare, work
        self.pieces: deque[Piece] = deque()
        self.preparing = 0
        self.failed = False
        self.changed = threading.Condition()

    def drain(self) -> None:
        """Take part in the work until nothing is left."""
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
                    piece = self.pieces.popleft()
                    return lambda: self.work(piece)
                for group in self.groups:
                    self.preparing += 1
                    return lambda group=group: self._add(group)
                if not self.preparing:
                    return None
                self.changed.wait()
        return None

    def _add(self, group: Group) -> None:
        pieces = self.prepare(group)
        with self.changed:
            self.pieces.extend(pieces)
            self.preparing -= 1
            self.changed.notify_all()


@lru_cache(maxsize=4)
def _pool(workers: int, threads_each: int) -> ThreadPoolExecutor:
    """Threads whose operators use ``threads_each`` threads. Setting that touches the whole process: put back after."""
    before = torch.get_num_threads()
    ready = threading.Barrier(workers + 1)

    def start() -> None:
        torch.set_num_threads(threads_each)
        ready.wait()

    pool = ThreadPoolExecutor(workers, thread_name_prefix="psa", initializer=start)
    for _ in range(workers):
        pool.submit(lambda: None)
    ready.wait()
    torch.set_num_threads(before)
    return pool

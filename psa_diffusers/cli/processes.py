"""Several processes on one job, as ``accelerate launch`` starts them: they share the work, and the main one speaks."""

from __future__ import annotations

import datetime
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from .errors import FAILED, WRONG_USAGE, CommandError, WrongUsageError, explain

T = TypeVar("T")
_PATIENCE = datetime.timedelta(days=30)  # one process may be done hours before another
_POLL_SECONDS = 0.1


class JointError(CommandError):
    """It failed in one of the processes, or in several."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class Processes:
    """The processes of a job; this class is the one that is alone.

    As a context it takes leave of the others: within it, and not after it, they can do things together.

    Attributes:
        index, count: This process's number (0 = main), and how many there are.
        device: What this process runs on, where a launcher decided; else None.
    """

    index, count = 0, 1
    device: str | None = None

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Every ``count``-th: this process's part of the work."""
        return list(items[self.index :: self.count])

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do this in every process, and wait for all of them.

        Returns:
            The results, in the order of the processes.

        Raises:
            CommandError: it failed in one of them, in all of them alike; what is made by then stays.
        """
        return [work()]


class LaunchedProcesses(Processes):
    """Processes that a launcher started, one a device. They exchange a few words over gloo, also on GPUs."""

    def __init__(self, expected: int, on_cpu: bool, command: str):
        import torch
        from accelerate import PartialState

        self.command = command
        state = PartialState(cpu=on_cpu or not torch.cuda.is_available(), backend="gloo", timeout=_PATIENCE)
        if state.num_processes != expected:  # else each of them would make everything
            raise WrongUsageError(
                f"the environment speaks of {expected} processes, but they cannot find each other. Start them by "
                "accelerate launch or torchrun, or unset WORLD_SIZE."
            )
        self.index, self.count, self.device = state.process_index, state.num_processes, str(state.device)
        # A launcher stops the others when one of them dies: what they are writing is then removed, as by Ctrl-C.
        signal.signal(signal.SIGTERM, _leave)
        self._is_waiting = False

    def __exit__(self, *_: object) -> None:
        # A process that ends with gloo's threads alive is now and then aborted by them, and its launcher then stops the
        # others. But taking leave in the middle of an exchange would wait for processes that may be gone.
        if not self._is_waiting:
            import torch.distributed as dist

            dist.destroy_process_group()

    def together(self, work: Callable[[], T]) -> list[T]:
        error, outcome = None, None
        try:
            outcome = (work(), None)
        except Exception as caught:
            error, outcome = caught, (None, explain(self.command, caught))
        outcomes = self._gather(outcome)
        failures = {index: failure for index, (_, failure) in enumerate(outcomes) if failure is not None}
        if failures:
            raise joint_error(failures, self.count) from error
        return [result for result, _ in outcomes]

    def _gather(self, item: Any) -> list[Any]:
        import torch
        import torch.distributed as dist

        self._is_waiting = True
        # Waited for here, where a signal is heard, and not in the exchange, where it is not.
        arrived = dist.all_reduce(torch.zeros(1), async_op=True)
        while not arrived.is_completed():
            time.sleep(_POLL_SECONDS)
        try:
            arrived.wait()
            items = [None] * self.count
            dist.all_gather_object(items, item)
        except RuntimeError as error:
            raise CommandError("another process stopped. Finished files were kept; run it again.") from error
        self._is_waiting = False
        return items


def find_processes(device: str | None, command: str = "psa-generate") -> Processes:
    """The processes that ``accelerate launch`` or ``torchrun`` started, or this one alone.

    Args:
        device: What the user asked to run on.
        command: Its name, for errors.
    """
    names = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
    sizes = [int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()]
    count = max(sizes, default=1)
    return LaunchedProcesses(count, on_cpu=device == "cpu", command=command) if count > 1 else Processes()


def own_device(processes: Processes, machine: tuple) -> tuple:
    """The machine's options (device first), with the device that the launcher gave to this process."""
    if machine[0] not in (None, "cpu"):
        raise WrongUsageError(f"--device {machine[0]}: leave it out, so that each process gets a device of its own.")
    return (processes.device, *machine[1:])


def joint_error(failures: dict[int, tuple[int, str]], count: int) -> JointError:
    """One error of those of the processes: (exit code, message) by their numbers."""
    codes = {code for code, _ in failures.values()}
    messages = list(dict.fromkeys(message for _, message in failures.values()))
    if codes == {WRONG_USAGE} or (len(failures) == count and len(messages) == 1):
        return JointError("\n".join(messages), max(codes))
    lines = [f"process {index} of {count} failed: {message}" for index, (_, message) in sorted(failures.items())]
    lines.append("Finished files were kept; the same command makes the rest.")
    return JointError("\n".join(lines), FAILED)


def _leave(*_: Any) -> None:
    raise SystemExit(128 + signal.SIGTERM)

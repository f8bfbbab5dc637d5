"""Runs the Triton backend on the CPU, in a process of its own.

``TRITON_INTERPRET=1`` has to be set before Triton is imported, and kernels decorated under it cannot be compiled any
more: so the interpreter gets a worker process, and everything else in the test session stays as it is.
"""

from __future__ import annotations

import multiprocessing
import os
from contextlib import contextmanager
from multiprocessing.connection import Connection

import torch


class Interpreter:
    """A worker process that imports ``psa_diffusers.backends.triton`` under the interpreter and calls its functions."""

    patience = 1800  # seconds; the machine may be busy

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other_end = context.Pipe()
        with _environment("TRITON_INTERPRET", "1"):
            self._process = context.Process(target=_serve, args=(other_end,), daemon=True)
            self._process.start()
        other_end.close()
        self._calls = 0

    def call(self, module: str, function: str, *arguments: object, **named: object) -> object:
        """``module.function(*arguments, **named)`` in the worker; what it raises is raised here."""
        self._calls += 1
        self._connection.send((self._calls, module, function, arguments, named))
        number = 0
        while number != self._calls:  # an answer that came too late is not the next call's
            if not self._connection.poll(timeout=self.patience):
                raise TimeoutError(f"{function} did not return under the interpreter within {self.patience} seconds")
            number, succeeded, result = self._connection.recv()
        if not succeeded:
            raise result
        return result

    def attend(self, *arguments: object, **named: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``attend_triton`` in the worker."""
        return self.call("psa_diffusers.backends.triton", "attend_triton", *arguments, **named)

    def close(self) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()


@contextmanager
def _environment(name: str, value: str):
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _serve(connection: Connection) -> None:
    import importlib

    torch.set_num_threads(1)
    # Tensors travel as bytes, strides and all: descriptors of shared memory would run out, and outlive their sender.
    while True:
        try:
            number, module, function, arguments, named = connection.recv()
        except EOFError:
            return
        try:
            result = (number, True, getattr(importlib.import_module(module), function)(*arguments, **named))
        except Exception as error:
            result = (number, False, error)
        connection.send(result)

"""What every combination must keep: PSA at full resolution gives the native output, by the schedule, and goes again."""

from __future__ import annotations

import torch

from psa_diffusers.integration import disable_psa, enable_psa, psa_statistics

from .tiny_wan import generate, tiny_config


def kinds(pipe) -> str:
    """One letter a step of the last run: dense (d), sparse (s), or skipped by a cache (-)."""
    letters = {"dense": "d", "sparse": "s", "skipped": "-"}
    return "".join(letters[kind] for *_, kind in psa_statistics(pipe).steps)


def check_native_output(pipe, expected: str | None, config: dict | None = None, **run) -> dict:
    """Run natively, with every block at full resolution, and natively again. Returns the statistics of the second."""
    run = {"steps": 8, **run}
    native = generate(pipe, **run)
    enable_psa(pipe, tiny_config(compute_budget=1.0, backend="reference", **(config or {})))
    for _ in range(2):  # a second run starts anew
        torch.testing.assert_close(generate(pipe, **run), native, rtol=1e-4, atol=1e-4)
        assert expected is None or kinds(pipe) == expected
    statistics = psa_statistics(pipe).to_dict()
    assert statistics["sparse_calls"] > 0
    assert torch.equal(generate(disable_psa(pipe), **run), native)
    return statistics

"""A recorder of self-attention calls."""

from __future__ import annotations

import pytest
from diffusers.models.transformers import transformer_wan

from psa_diffusers.integration import operations

from .tiny_wan import dense_attend, full_plan


class Recorder:
    """What ran, in order: "dense" and "sparse" self-attention, and the plans that were built."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.cross_calls = 0
        self.plans: list[dict] = []
        self.fail_at: int | None = None

    def on_attention(self, kind: str) -> None:
        if self.fail_at is not None and len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append(kind)

    def steps(self, calls_a_step: int) -> str:
        """One letter a step, d or s. Fails where a step mixes the two."""
        groups = [self.calls[i : i + calls_a_step] for i in range(0, len(self.calls), calls_a_step)]
        assert all(len(set(group)) == 1 and len(group) == calls_a_step for group in groups), self.calls
        return "".join(group[0][0] for group in groups)


@pytest.fixture
def recorder(monkeypatch):
    """Records calls, with dense stand-ins for planning and for sparse attention."""
    record, native = Recorder(), transformer_wan.dispatch_attention_fn

    def dispatch(query, key, value, *args, **options):
        if query.shape[1] == key.shape[1]:
            record.on_attention("dense")
        else:
            record.cross_calls += 1
        return native(query, key, value, *args, **options)

    def build_plan(query, key, value, config, **options):
        record.plans.append({"shape": tuple(query.shape), **options})
        return full_plan(query, key, value, config)

    def attend(*args):
        record.on_attention("sparse")
        return dense_attend(*args)

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", dispatch)
    monkeypatch.setattr(operations, "build_plan", build_plan)
    monkeypatch.setattr(operations, "attend", attend)
    monkeypatch.setattr(operations, "choose_backend", lambda *_: ("stand-in", "a test asked for it"))
    return record

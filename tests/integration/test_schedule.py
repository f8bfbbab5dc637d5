"""The exact sequence of dense and sparse calls, for everything that changes which steps a run executes."""

import pytest
import torch

from psa_diffusers import PSAConfig
from psa_diffusers.integration import PSAProcessor, enable_psa, psa_statistics, schedule
from psa_diffusers.integration.schedule import (
    CallContext,
    Step,
    StepClock,
    dense_reason,
    dense_steps,
    rounding_note,
)

from .tiny_wan import LAYERS, SCHEDULERS, generate, pipeline, tiny_config

BRANCHES = 2


@pytest.mark.parametrize(
    ("share", "total", "steps"),
    [(0.25, 8, 2), (0.25, 7, 2), (0.25, 1, 1), (0.0, 8, 0), (1.0, 8, 8), (0.07, 100, 7), (0.1, 30, 3), (0.25, 50, 13)],
)
def test_dense_steps_round_up(share, total, steps):
    assert dense_steps(share, total) == steps


def test_reasons():
    config = PSAConfig(dense_warmup=0.25, dense_last=0.25)
    reasons = [dense_reason(Step(index, 8), config) for index in range(8)]
    assert reasons == ["dense warm-up"] * 2 + [None] * 4 + ["dense last steps"] * 2
    assert dense_reason(None, config) == "step unknown"


SEQUENCES = [
    # kind, scheduler, run, config, expected letter a step: d = dense, s = sparse
    ("t2v", "unipc", {"steps": 8}, {}, "ddssssss"),
    ("t2v", "euler", {"steps": 8}, {}, "ddssssss"),
    ("t2v", "heun", {"steps": 4}, {}, "ddsssss"),  # 7 timesteps for 4 steps of second order
    ("t2v", "unipc", {"steps": 5}, {}, "ddsss"),
    ("t2v", "unipc", {"steps": 1}, {}, "d"),
    ("t2v", "unipc", {"steps": 8}, {"dense_last": 0.2}, "ddssssdd"),
    ("t2v", "unipc", {"steps": 4}, {"dense_warmup": 0.0}, "ssss"),
    ("t2v", "unipc", {"steps": 4}, {"dense_warmup": 1.0}, "dddd"),
    ("t2v", "unipc", {"steps": 8, "guidance_scale": 1.0}, {}, "ddssssss"),
    ("ti2v", "unipc", {"steps": 8}, {}, "ddssssss"),
    ("ti2v-image", "unipc", {"steps": 8}, {}, "ddssssss"),
    ("ti2v-image", "heun", {"steps": 4}, {}, "ddsssss"),
    ("i2v", "unipc", {"steps": 8}, {}, "ddssssss"),
    ("i2v", "euler", {"steps": 8, "guidance_scale": 1.0}, {}, "ddssssss"),
    ("i2v", "heun", {"steps": 4}, {}, "ddsssss"),
    ("vace", "unipc", {"steps": 8}, {}, "ddssssss"),
    # Video-to-video runs the tail of the timesteps, and the warm-up is a share of that tail.
    ("v2v", "unipc", {"steps": 8, "strength": 0.5}, {}, "dsss"),
    ("v2v", "euler", {"steps": 10, "strength": 0.8}, {}, "ddssssss"),
    ("v2v", "unipc", {"steps": 8, "strength": 1.0, "guidance_scale": 1.0}, {}, "ddssssss"),
    ("v2v", "unipc", {"steps": 8, "strength": 0.5}, {"dense_last": 0.25}, "dssd"),
    # Two experts: the warm-up is a share of the whole run, not of each one's.
    ("experts", "unipc", {"steps": 8}, {}, "ddssssss"),
    ("experts", "euler", {"steps": 8, "guidance_scale": 1.0}, {"dense_warmup": 0.5}, "ddddssss"),
    ("experts", "heun", {"steps": 4}, {}, "ddsssss"),
]


# Distilled models take 4 to 8 steps: whole steps make the dense share larger than a quarter there, and that is said.
FEW_STEPS = {1: 1, 2: 1, 3: 1, 4: 1, 5: 2, 6: 2, 7: 2, 8: 2, 9: 3}


@pytest.mark.parametrize(("total", "dense"), FEW_STEPS.items())
def test_few_steps(total, dense, recorder):
    pipe = enable_psa(pipeline("t2v", "euler"), tiny_config())
    generate(pipe, steps=total, guidance_scale=1.0)
    assert recorder.steps(LAYERS) == "d" * dense + "s" * (total - dense)
    notes = psa_statistics(pipe).notes
    if dense / total <= 0.30:
        assert notes == []
    else:
        (note,) = notes
        assert note.startswith(f"{dense} of {total} steps ({dense / total:.0%}) run dense by dense_warmup=0.25, ")
        assert note.endswith("so that nothing is sparse; lower it." if total == 1 else "rounded up to whole steps.")


def test_a_custom_list_of_few_timesteps(recorder):
    """As distilled models are called: the list of sigmas is given, not a number of steps."""
    pipe = enable_psa(pipeline("t2v", "euler"), tiny_config())
    pipe.scheduler.set_timesteps(sigmas=[1.0, 0.9, 0.7, 0.4], device="cpu")
    timesteps = pipe.scheduler.timesteps
    pipe.scheduler.set_timesteps = lambda *args, **kwargs: setattr(pipe.scheduler, "timesteps", timesteps.clone())
    generate(pipe, steps=4, guidance_scale=1.0)
    assert recorder.steps(LAYERS) == "dsss"


def test_a_share_that_was_asked_for_needs_no_remark():
    remarks = [
        rounding_note(PSAConfig(dense_warmup=warmup, dense_last=last), total)
        for warmup, last, total in [(0.25, 0.0, 50), (1.0, 0.0, 4), (0.5, 0.5, 6), (0.0, 0.0, 1), (0.25, 0.25, 8)]
    ]
    assert remarks == [None] * 5
    assert "dense_warmup=0.2, dense_last=0.2" in rounding_note(PSAConfig(dense_warmup=0.2, dense_last=0.2), 4)
    assert rounding_note(PSAConfig(dense_warmup=0.25, dense_last=0.25), 2).startswith("2 of 2 steps (100%)")


@pytest.mark.parametrize("told", [True, False], ids=["context", "timesteps"])
@pytest.mark.parametrize(("kind", "scheduler", "run", "config", "expected"), SEQUENCES)
def test_sequence(kind, scheduler, run, config, expected, told, recorder):
    pipe = enable_psa(pipeline(kind, scheduler), tiny_config(**config))
    if not told:  # as in versions of diffusers, and pipelines, that do not tell the model its step
        _forget_context(pipe)
    generate(pipe, **run)
    calls_a_step = (LAYERS + (kind == "vace")) * (1 if run.get("guidance_scale") == 1.0 else BRANCHES)
    assert recorder.steps(calls_a_step) == expected
    total, kinds = len(expected), {"d": "dense", "s": "sparse"}
    assert psa_statistics(pipe).steps == [(i, total, kinds[letter]) for i, letter in enumerate(expected)]


def _forget_context(pipe):
    for model in (pipe.transformer, getattr(pipe, "transformer_2", None)):
        if model is not None:
            del model.__dict__["cache_context"]


def test_both_experts_run(recorder):
    pipe = pipeline("experts")
    calls = {name: 0 for name in ("transformer", "transformer_2")}
    for name in calls:
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    generate(enable_psa(pipe, tiny_config()), steps=8)
    assert calls["transformer"] > 0 and calls["transformer_2"] > 0 and sum(calls.values()) == 16


@pytest.mark.parametrize("told", [True, False], ids=["context", "timesteps"])
@pytest.mark.parametrize("kind", ["t2v", "v2v", "experts"])
def test_repeated_runs_with_other_step_counts(kind, told, recorder):
    pipe = enable_psa(pipeline(kind), tiny_config())
    if not told:
        _forget_context(pipe)
    tail = {"strength": 1.0} if kind == "v2v" else {}
    for steps, expected in ((8, "ddssssss"), (4, "dsss"), (4, "dsss"), (12, "dddsssssssss")):
        recorder.calls.clear()
        generate(pipe, steps=steps, **tail)
        assert recorder.steps(BRANCHES * LAYERS) == expected
        assert len(psa_statistics(pipe).steps) == steps  # counted anew


@pytest.mark.parametrize("kind", ["t2v", "i2v", "v2v", "experts"])
def test_a_run_after_an_interrupted_one(kind, recorder):
    pipe = enable_psa(pipeline(kind), tiny_config(refresh_every=2))
    recorder.fail_at = 4 * BRANCHES * LAYERS + 1  # inside the fifth step
    tail = {"strength": 1.0} if kind == "v2v" else {}
    with pytest.raises(KeyboardInterrupt):
        generate(pipe, steps=8, **tail)
    assert psa_statistics(pipe).last_step == (4, 8, "sparse")
    recorder.fail_at = None
    recorder.calls.clear()
    generate(pipe, steps=8, **tail)
    assert recorder.steps(BRANCHES * LAYERS) == "ddssssss"
    assert psa_statistics(pipe).sparse_calls == 6 * BRANCHES * LAYERS


def test_a_run_interrupted_by_the_callback(recorder):
    pipe = enable_psa(pipeline(), tiny_config())

    def stop(pipe, index, timestep, inputs):
        pipe._interrupt = index == 2
        return inputs

    generate(pipe, steps=8, callback_on_step_end=stop)
    assert recorder.steps(BRANCHES * LAYERS) == "dds"
    recorder.calls.clear()
    generate(pipe, steps=4)
    assert recorder.steps(BRANCHES * LAYERS) == "dsss"


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_loop_of_ones_own(scheduler, batched, recorder):
    """Guidance batched in one call, or in two; the timestep given to the transformer is a view of the scheduler's."""
    pipe = pipeline("t2v", scheduler)
    enable_psa(pipe, tiny_config())
    for _ in range(2):
        recorder.calls.clear()
        pipe.scheduler.set_timesteps(4)
        for timestep in pipe.scheduler.timesteps:
            for _ in range(1 if batched else 2):
                forward(pipe.transformer, timestep, batch=2 if batched else 1)
        steps = len(pipe.scheduler.timesteps)
        expected = {4: "dsss", 7: "ddsssss"}[steps]
        assert recorder.steps(LAYERS * (1 if batched else 2)) == expected


@torch.no_grad()
def forward(model, timestep, batch=1, frames=3):
    latents, text = torch.ones(batch, 16, frames, 4, 6), torch.ones(batch, 8, 16)
    return model(latents, timestep.expand(batch), text, return_dict=False)[0]


def test_the_step_said_explicitly(recorder):
    model = pipeline().transformer
    processor = PSAProcessor(model, tiny_config())
    model.set_attn_processor(processor)
    for index in range(4):
        with processor.step(index, 4):
            forward(model, torch.tensor(500.0))
    assert recorder.steps(LAYERS) == "dsss"
    with pytest.raises(ValueError, match=r"index must be in \[0, total\), but is 4"), processor.step(4, 4):
        pass


def test_no_step_known_stays_dense_and_warns_once(recorder, caplog):
    model = pipeline().transformer
    native = forward(model, torch.tensor(500.0))
    recorder.calls.clear()
    processor = PSAProcessor(model, tiny_config())
    model.set_attn_processor(processor)
    outputs = [forward(model, torch.tensor(500.0)) for _ in range(3)]
    assert all(torch.equal(output, native) for output in outputs)
    assert recorder.calls == ["dense"] * 3 * LAYERS
    assert processor.statistics.dense_reasons == {"step unknown": 3 * LAYERS}
    assert [record.getMessage().count("PSA stays dense") for record in caplog.records] == [1]


def test_outside_a_run_the_step_of_the_last_one_is_not_reused(recorder):
    pipe = enable_psa(pipeline(), tiny_config())
    generate(pipe, steps=4)
    recorder.calls.clear()
    forward(pipe.transformer, torch.tensor(7.0))  # not one of the timesteps
    assert recorder.calls == ["dense"] * LAYERS


class Pipe:
    """What the clock reads of a pipeline."""

    def __init__(self, timesteps, count=None):
        self.scheduler = type("Scheduler", (), {"timesteps": timesteps})()
        self._current_timestep = None
        if count is not None:
            self._num_timesteps = count


def test_clock_tells_repeated_timesteps_apart():
    timesteps = torch.tensor([900.0, 600.0, 600.0, 300.0, 300.0])
    clock, pipe = StepClock(), Pipe(timesteps, 5)
    indices = []
    for timestep in timesteps:
        pipe._current_timestep = timestep
        indices.append(clock.locate(pipe, None)[0].index)
    assert indices == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("count", [3, None])
def test_clock_counts_the_tail_that_runs(count):
    timesteps = torch.arange(1000, 0, -100)
    clock, pipe = StepClock(), Pipe(timesteps, count)
    steps = []
    for timestep in timesteps[7:]:
        pipe._current_timestep = timestep
        steps.append(clock.locate(pipe, None)[0])
    assert steps == [Step(0, 3), Step(1, 3), Step(2, 3)]


def test_clock_does_not_believe_a_length_that_the_position_contradicts():
    """Some pipelines count steps, not timesteps: with a scheduler of second order the run is longer."""
    timesteps = torch.arange(1000, 0, -100)
    clock, pipe = StepClock(), Pipe(timesteps, 6)
    steps = []
    for timestep in timesteps[1:]:
        pipe._current_timestep = timestep
        steps.append(clock.locate(pipe, None)[0])
    assert steps == [Step(index, 9) for index in range(9)]


def test_clock_starting_late_still_counts_the_whole_run():
    """The second expert alone is sparse: its processor sees no step before the middle of the run."""
    timesteps = torch.arange(1000, 0, -100)
    clock, pipe = StepClock(), Pipe(timesteps, 10)
    pipe._current_timestep = timesteps[6]
    assert clock.locate(pipe, None) == (Step(6, 10), True)


@pytest.mark.parametrize("value", [600, 600.0, torch.tensor(600.0), torch.tensor([600]).bfloat16(), torch.tensor(601)])
def test_clock_finds_a_copied_timestep_by_value(value):
    clock, pipe = StepClock(), Pipe(torch.tensor([900.0, 600.0, 300.0]), 3)
    assert clock.locate(pipe, value)[0].index in (0, 1)
    assert clock.locate(Pipe(torch.tensor([900.0, 600.0, 300.0]), 3), value)[0] is not None


@pytest.mark.parametrize("value", [None, 450, torch.tensor(450.0), torch.empty(0), "600", torch.tensor(0.0)])
def test_clock_does_not_guess(value):
    clock = StepClock()
    assert clock.locate(Pipe(torch.tensor([900.0, 600.0, 300.0]), 3), value) == (None, False)
    assert clock.locate(None, value) == (None, False)


def test_clock_prefers_what_is_said():
    timesteps = torch.tensor([900.0, 600.0, 300.0])
    pipe = Pipe(timesteps, 3)
    pipe._current_timestep = timesteps[1]
    context = CallContext("cond", 2, 3)
    assert StepClock().locate(pipe, None)[0] == Step(1, 3)
    assert StepClock().locate(pipe, None, context)[0] == Step(2, 3)
    assert StepClock().locate(pipe, None, context, Step(0, 9))[0] == Step(0, 9)
    assert StepClock().locate(pipe, None, CallContext("cond", 2))[0] == Step(2, 3)
    assert StepClock().locate(pipe, None, CallContext("cond"))[0] == Step(1, 3)


def test_clock_sees_a_new_run():
    clock, pipe = StepClock(), Pipe(torch.tensor([900.0, 600.0, 300.0]), 3)
    seen = []
    for run in range(2):
        if run:
            pipe.scheduler.timesteps = pipe.scheduler.timesteps.clone()
        for timestep in pipe.scheduler.timesteps:
            pipe._current_timestep = timestep
            seen += [clock.locate(pipe, None)[1], clock.locate(pipe, None)[1]]
    assert seen == [True, False, False, False, False, False] * 2


def test_clock_takes_the_schedulers_count_where_reading_would_wait(monkeypatch):
    """Some pipelines hand on copies of their timesteps: on a GPU their values are out of reach."""
    monkeypatch.setattr(schedule, "_is_readable", lambda *_: False)
    pipe = Pipe(torch.tensor([900.0, 600.0, 300.0]), 3)
    pipe.scheduler._step_index = None
    clock, steps = StepClock(), []
    for count, timestep in enumerate(pipe.scheduler.timesteps, start=1):
        steps.append(clock.locate(pipe, timestep.clone() + 50.0)[0])
        pipe.scheduler._step_index = count
    assert steps == [Step(0, 3), Step(1, 3), Step(2, 3)]
    assert clock.locate(pipe, torch.tensor(5.0)) == (None, False)  # after the run
    pipe.scheduler._step_index, pipe.scheduler._begin_index = None, 1
    assert StepClock().locate(pipe, torch.tensor(5.0))[0] == Step(0, 2)
    del pipe.scheduler._step_index  # a scheduler that does not count: the value after all
    assert StepClock().locate(pipe, torch.tensor(600.0))[0] == Step(0, 2)

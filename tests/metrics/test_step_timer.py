"""Seconds a step, and tensors that are apart."""

import pytest
import torch

from psa_diffusers.metrics import StepTimer, relative_error

from ..integration.tiny_wan import generate, pipeline


def test_one_time_a_step_and_no_hook_left():
    pipe = pipeline()
    timer = StepTimer(pipe)
    generate(pipe, steps=3, callback_on_step_end=timer)
    assert len(timer.seconds()) == 3 and all(seconds > 0 for seconds in timer.seconds())
    assert not pipe.transformer._forward_pre_hooks


def test_a_timer_that_never_ran_can_be_closed():
    pipe = pipeline("experts")
    timer = StepTimer(pipe)
    assert pipe.transformer._forward_pre_hooks and pipe.transformer_2._forward_pre_hooks
    timer.close()
    assert timer.seconds() == [] and not pipe.transformer_2._forward_pre_hooks


def test_relative_error():
    reference = torch.tensor([3.0, 4.0])
    assert relative_error(reference, reference) == 0
    assert relative_error(reference, torch.tensor([3.0, 4.5])) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="one shape"):
        relative_error(reference, torch.zeros(3))

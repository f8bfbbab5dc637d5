"""Level masks kept while a pipeline runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from psa_diffusers import PSAConfig, enable_psa
from psa_diffusers.integration import capture_level_masks, operations, psa_statistics
from psa_diffusers.integration.level_masks import spread

from .tiny_wan import generate, pipeline

LARGE = {"height": 64, "width": 96, "num_frames": 17}
CONFIG = PSAConfig(query_block_size=16, kv_block_size=16, dense_warmup=0.25, compute_budget=0.4)


def test_masks_are_those_of_the_plans_and_the_run_is_unchanged():
    pipe = enable_psa(pipeline(), CONFIG)
    plain = generate(pipe, steps=4, **LARGE)
    plans, real = [], operations.build_plan

    def noting(*arguments, **options):
        plans.append(real(*arguments, **options))
        return plans[-1]

    operations.build_plan = noting
    try:
        with capture_level_masks(pipe, steps=[1, 3]) as recorder:
            again = generate(pipe, steps=4, **LARGE)
        assert operations.build_plan is noting
    finally:
        operations.build_plan = real
    assert torch.equal(torch.as_tensor(plain), torch.as_tensor(again))
    masks = recorder.read()
    layers = 1 + max(call.layer for call in psa_statistics(pipe).calls)
    heads = plans[0].level_mask.shape[1]
    assert [(mask.step, mask.layer, mask.head) for mask in masks] == [
        (step, layer, head) for step in (1, 3) for layer in range(layers) for head in range(heads)
    ]
    # With guidance a layer has two calls a step, which differ from the second layer on: the first is kept.
    first, second = (plans[place].level_mask[0].numpy() for place in (layers - 1, 2 * layers - 1))
    assert not np.array_equal(first, second)
    kept = masks[(layers - 1) * heads : layers * heads]
    assert all(np.array_equal(mask.levels, first[mask.head]) for mask in kept)
    assert masks[0].num_levels == CONFIG.num_levels


def test_a_few_layers_and_heads_evenly_spread():
    pipe = enable_psa(pipeline(), CONFIG)
    with capture_level_masks(pipe, steps=[2], layers=1, heads=1) as recorder:
        generate(pipe, steps=4, **LARGE)
    assert [(mask.step, mask.layer, mask.head) for mask in recorder.read()] == [(2, 0, 0)]
    assert spread(40, 4) == [0, 13, 26, 39] and spread(2, 4) == [0, 1] and spread(1, 4) == [0]


@pytest.mark.parametrize("steps", [[], [0], [9]])
def test_dense_and_absent_steps_give_none(steps):
    pipe = enable_psa(pipeline(), CONFIG)
    with capture_level_masks(pipe, steps=steps) as recorder:
        generate(pipe, steps=4, **LARGE)
    assert recorder.read() == []

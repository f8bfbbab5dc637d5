"""The drawn clips, their captions and the judge that the demo model is measured with."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "demo_model"))
pytest.importorskip("skimage")

import captions
import judge
import scenes


def test_held_out_combinations_are_disjoint_from_training_and_match_the_committed_prompts():
    held_out, training = set(scenes.held_out_combinations()), set(scenes.training_combinations())
    assert len(held_out) == 100
    assert not held_out & training
    assert {what for what, _ in captions.read_eval_prompts()} == held_out


def test_a_scene_is_the_same_at_every_resolution():
    scene = scenes.random_scene(scenes.combinations()[7], random.Random(0))
    large = scenes.render(scene, 9, 128, 128).reshape(9, 32, 4, 32, 4, 3).mean((2, 4))
    assert np.abs(large - scenes.render(scene, 9, 32, 32)).mean() < 0.01


@pytest.mark.parametrize("seed", range(4))
def test_judge_reads_ground_truth(seed):
    rng = random.Random(seed)
    for what in rng.sample(scenes.combinations(), 10):
        video = scenes.render(scenes.random_scene(what, rng), 17, 96, 96)
        video = np.clip(video + np.random.default_rng(seed).normal(0, 0.02, video.shape), 0, 1)
        assert all(judge.judge(video).agrees(what).values()), what


def test_judge_sees_what_is_missing_or_reversed():
    what = scenes.Combination("star", "red", "left", "black")
    video = scenes.render(scenes.random_scene(what, random.Random(0)), 17, 96, 96)
    assert judge.judge(video[::-1]).motion == "right"
    assert judge.judge(video[:1].repeat(17, 0)).motion == judge.UNKNOWN
    empty = np.zeros_like(video)
    assert judge.judge(empty).shape == judge.UNKNOWN
    assert judge.judge(empty).background == "black"


def test_judge_refuses_other_layouts():
    with pytest.raises(ValueError, match="frames, height, width, 3"):
        judge.judge(np.zeros((3, 17, 96, 96)))


def test_every_caption_is_within_the_vocabulary():
    tokenizer = captions.build_tokenizer()
    rng = random.Random(0)
    for what in scenes.combinations():
        ids = tokenizer(captions.caption(what, rng)).input_ids
        assert tokenizer.unk_token_id not in ids
        assert ids[-1] == tokenizer.eos_token_id

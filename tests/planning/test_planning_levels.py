import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_diffusers.planning.levels import cap_levels, threshold_levels, topk_levels


def rows(*values):
    return torch.tensor(values, dtype=torch.float32)[None, None]


def by_hand_threshold(row, thresholds):
    """The rule as it is written, one row in plain Python."""
    total = sum(row)
    ranked = sorted(range(len(row)), key=lambda block: (-row[block], block))
    levels, before = [0] * len(row), 0.0
    for block in ranked:
        finest = [level for level, tau in enumerate(thresholds, start=1) if before < tau]
        levels[block] = finest[0] if finest else 0
        before += row[block] / total
    if not any(levels):
        levels[ranked[0]] = 1
    return levels


def test_threshold_worked_example():
    assert threshold_levels(rows([0.75, 0.2, 0.05]), (0.7, 0.8, 0.9, 0.9), None).tolist() == [[[[1, 2, 0]]]]


def test_threshold_normalises_and_sorts():
    assert threshold_levels(rows([1.0, 15.0, 4.0]), (0.7, 0.8, 0.9, 0.9), None).tolist() == [[[[0, 1, 2]]]]


def test_threshold_ties_go_by_block_index():
    assert threshold_levels(rows([0.25] * 4), (0.3, 0.6, 0.6, 0.6), None).tolist() == [[[[1, 1, 2, 0]]]]


def test_threshold_row_with_nothing_keeps_its_top_block():
    assert threshold_levels(rows([0.1, 0.6, 0.3]), (0.0, 0.0, 0.0, 0.0), None).tolist() == [[[[0, 1, 0]]]]


def test_threshold_one_keeps_all():
    assert threshold_levels(rows([0.1, 0.6, 0.3]), (1.0, 1.0, 1.0, 1.0), None).tolist() == [[[[1, 1, 1]]]]


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=9),
    st.lists(st.sampled_from([0.0, 0.21, 0.37, 0.53, 0.71, 0.83, 0.97]), min_size=4, max_size=4),
)
@settings(max_examples=150, deadline=None)
def test_threshold_against_the_rule_as_written(row, thresholds):
    got = threshold_levels(rows([float(item) for item in row]), tuple(thresholds), None)
    assert got[0, 0, 0].tolist() == by_hand_threshold(row, thresholds)


def test_topk_shares_by_hand():
    score = rows([0.05, 0.5, 0.1, 0.2, 0.03, 0.04, 0.02, 0.01, 0.03, 0.02])
    # Of ten blocks one at level 1, two at level 2, none at level 3, three at level 4.
    got = topk_levels(score, (0.1, 0.2, 0.0, 0.3), None)[0, 0, 0].tolist()
    assert got == [4, 1, 2, 2, 4, 4, 0, 0, 0, 0]


def test_topk_rounds_the_ends_of_the_shares():
    assert topk_levels(rows([4.0, 3.0, 2.0]), (0.5, 0.0, 0.0, 0.0), None).tolist() == [[[[1, 1, 0]]]]
    assert topk_levels(rows([4.0, 3.0, 2.0]), (0.4, 0.0, 0.0, 0.0), None).tolist() == [[[[1, 0, 0]]]]
    score = torch.rand(1, 1, 1, 20)
    counts = torch.bincount(topk_levels(score, (0.15, 0.10, 0.20, 0.0), None).flatten().int(), minlength=4).tolist()
    assert counts == [11, 3, 2, 4]


def test_topk_row_with_nothing_keeps_its_top_block_and_ties_go_by_index():
    assert topk_levels(rows([0.3, 0.4, 0.4]), (0.01, 0.0, 0.0, 0.0), None).tolist() == [[[[0, 1, 0]]]]


def test_blocks_of_padding_get_nothing_and_take_no_share():
    counted = torch.tensor([[True, True, True, True, False, False]])
    score = rows([0.1, 0.4, 0.3, 0.2, 9.0, 9.0])
    assert topk_levels(score, (0.5, 0.0, 0.0, 0.0), counted)[0, 0, 0].tolist() == [0, 1, 1, 0, 0, 0]
    assert threshold_levels(score, (0.5, 0.8, 0.8, 0.8), counted)[0, 0, 0].tolist() == [0, 1, 1, 2, 0, 0]
    none = torch.zeros(1, 6, dtype=torch.bool)
    assert not topk_levels(score, (0.5, 0.0, 0.0, 0.0), none).any()
    assert not threshold_levels(score, (0.5, 0.8, 0.8, 0.8), none).any()


def test_cap_keeps_skip_and_refines_the_rest():
    levels = torch.tensor([[[[0, 1, 4, 3, 2]]]], dtype=torch.int8)
    cap = torch.tensor([[[1, 1, 2, 4, 1]]], dtype=torch.int8)
    assert cap_levels(levels, cap).tolist() == [[[[0, 1, 2, 3, 1]]]]


@pytest.mark.parametrize("rule", [threshold_levels, topk_levels])
def test_scores_that_are_not_numbers_still_give_a_valid_plan(rule):
    score = torch.rand(1, 2, 3, 8)
    score[0, 0, 1] = float("nan")
    levels = rule(score, (0.3, 0.1, 0.1, 0.0), None)
    assert bool((levels > 0).any(-1).all())
    assert int(levels.min()) >= 0
    assert int(levels.max()) <= 4

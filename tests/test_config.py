"""PSAConfig: valid by default, frozen, clear about what is wrong, and the same after a file."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml

from psa_diffusers import PSAConfig

FULL = PSAConfig(
    query_block_size=64,
    kv_block_size=32,
    num_levels=3,
    rule="threshold",
    level_thresholds=(0.6, 0.8, 0.95),
    similarity_thresholds=(0.7, 0.8),
    importance="antidiagonal",
    importance_reduction="max",
    sampled_queries=8,
    sampled_keys=4,
    logit_correction="none",
    order="raster",
    dense_warmup=0.1,
    dense_last=0.05,
    dense_layers=(0, 29),
    refresh_every=2,
    backend="reference",
    seed=7,
)


def test_the_default_is_the_budget_rule_at_15_percent():
    config = PSAConfig()
    assert (config.rule, config.compute_budget) == ("budget", 0.15)
    assert (config.query_block_size, config.kv_block_size, config.num_levels) == (128, 64, 4)
    assert config.level_thresholds is None and config.level_fractions is None
    assert PSAConfig.preset("default") == config


def test_each_rule_has_its_own_settings_and_no_other():
    assert PSAConfig(rule="threshold").level_thresholds == (0.7, 0.8, 0.9, 0.9)
    assert PSAConfig(rule="threshold").compute_budget is None
    assert PSAConfig(rule="topk").level_fractions == (0.15, 0.10, 0.20, 0.0)


def test_corrections_belong_to_the_budget_rule_and_the_paper_has_none():
    assert PSAConfig().logit_correction == "variance"
    assert PSAConfig(logit_correction="none").logit_correction == "none"
    for name in (*(f"psa-{number}" for number in range(1, 6)), "psa-threshold"):
        preset = PSAConfig.preset(name)
        assert (preset.logit_correction, preset.value_correction) == ("none", None)
    assert PSAConfig(rule="topk", logit_correction="variance").logit_correction == "variance"


def test_it_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PSAConfig().seed = 1


def test_every_field_of_the_full_example_differs_from_the_default():
    """So that the round trips below would notice any field that is lost."""
    same = [f.name for f in dataclasses.fields(PSAConfig) if getattr(FULL, f.name) == getattr(PSAConfig(), f.name)]
    assert same == ["target_error", "budget_schedule", "level_fractions"]  # of other rules, so None in both
    assert PSAConfig().value_correction == "covariance" and FULL.value_correction is None


SCHEDULE = [(0.9, (0.1, 0.05)), (0.25, (0.3, 0.2)), {"at": 0.0, "budget": 0.2, "expert": "transformer_2"}]


@pytest.mark.parametrize(
    "config",
    [
        PSAConfig(),
        FULL,
        PSAConfig(rule="topk"),
        PSAConfig(compute_budget=1),
        PSAConfig(budget_schedule=SCHEDULE),
        PSAConfig(target_error=0.03),
    ],
)
@pytest.mark.parametrize("name", ["config.yaml", "config.yml", "config.json"])
def test_files_and_dictionaries_give_the_same_config_back(config, name, tmp_path):
    assert PSAConfig.from_dict(config.to_dict()) == config
    config.save(tmp_path / name)
    assert PSAConfig.load(tmp_path / name) == config
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_files_hold_plain_values(tmp_path):
    FULL.save(tmp_path / "a.yaml")
    FULL.save(tmp_path / "a.json")
    values = yaml.safe_load((tmp_path / "a.yaml").read_text())
    assert values == json.loads((tmp_path / "a.json").read_text()) == FULL.to_dict()
    assert values["dense_layers"] == [0, 29]


def test_what_a_file_leaves_out_keeps_its_default(tmp_path):
    (tmp_path / "a.yaml").write_text("compute_budget: 0.3\n")
    assert PSAConfig.load(tmp_path / "a.yaml") == PSAConfig(compute_budget=0.3)
    (tmp_path / "empty.yaml").write_text("")
    assert PSAConfig.load(tmp_path / "empty.yaml") == PSAConfig()


BAD = [
    ({"compute_budget": 0}, r"compute_budget must be in \(0, 1\]"),
    ({"compute_budget": 1.5}, r"compute_budget must be in \(0, 1\]"),
    ({"compute_budget": "much"}, "compute_budget must be a number"),
    ({"compute_budget": True}, "compute_budget must be a number"),
    ({"compute_budget": float("nan")}, "compute_budget must be in"),
    ({"compute_budget": 0.01}, "1 / kv_block_size = 0.015625"),
    ({"compute_budget": 0.2, "rule": "topk"}, "only rule='budget' reads it"),
    ({"level_fractions": (1, 0, 0, 0)}, "only rule='topk' reads it"),
    ({"level_thresholds": (0.5,) * 4, "rule": "topk"}, "only rule='threshold' reads it"),
    ({"rule": "best"}, "rule must be one of budget, threshold, topk"),
    ({"importance": "magic"}, "importance must be one of"),
    ({"importance_reduction": "mean"}, "importance_reduction must be one of sum, max"),
    ({"logit_correction": "some"}, "logit_correction must be one of"),
    ({"value_correction": "some"}, "value_correction must be one of none, covariance"),
    ({"value_correction": "covariance", "rule": "topk"}, "only rule='budget' reads it"),
    ({"order": "hilbert"}, "order must be one of gilbert, raster"),
    ({"backend": "cuda"}, "backend must be one of"),
    ({"query_block_size": 100}, "query_block_size must be a power of two"),
    ({"query_block_size": 128.0}, "query_block_size must be a whole number"),
    ({"kv_block_size": 0}, "kv_block_size must be a power of two"),
    ({"kv_block_size": 8}, r"kv_block_size must be above 2 \*\* \(num_levels - 1\) = 8"),
    ({"num_levels": 0}, "num_levels must be at least 1"),
    ({"num_levels": 3, "rule": "topk"}, "level_fractions must be given"),
    ({"rule": "threshold", "level_thresholds": (0.5, 0.6)}, "level_thresholds must be 4 numbers"),
    ({"rule": "threshold", "level_thresholds": (0.5, 0.6, 0.7, 1.1)}, r"numbers in \[0, 1\]"),
    ({"rule": "topk", "level_fractions": (0.5, 0.6, 0, 0)}, "shares with a sum in"),
    ({"rule": "topk", "level_fractions": (0, 0, 0, 0)}, "shares with a sum in"),
    ({"rule": "topk", "level_fractions": 0.5}, "level_fractions must be a list"),
    ({"similarity_thresholds": (0.5,)}, "similarity_thresholds must be 3 numbers"),
    ({"similarity_thresholds": (0.5, 0.5, 2)}, r"cosines in \[-1, 1\]"),
    ({"dense_warmup": -0.1}, "dense_warmup must be a share"),
    ({"dense_last": 1.1}, "dense_last must be a share"),
    ({"dense_layers": (-1,)}, "dense_layers must be indices from 0"),
    ({"dense_layers": (0.5,)}, "dense_layers must be a list of whole numbers"),
    ({"dense_layers": None}, "dense_layers must be a list"),
    ({"refresh_every": 0}, "refresh_every must be at least 1"),
    ({"sampled_keys": 0}, "sampled_keys must be at least 1"),
    ({"seed": "x"}, "seed must be a whole number"),
    ({"target_error": 0}, r"target_error must be a relative error in \(0, 1\), but is 0"),
    ({"target_error": 1.0}, "target_error must be a relative error"),
    ({"target_error": "small"}, "target_error must be a number"),
    ({"target_error": 0.1, "compute_budget": 0.2}, r"compute_budget must be left out \(None\) with target_error"),
    (
        {"target_error": 0.1, "budget_schedule": [(0, 0.2)]},
        "budget_schedule must be left out .* target_error",
    ),
    ({"target_error": 0.1, "rule": "topk"}, "only rule='budget' reads it"),
    ({"budget_schedule": 0.2}, r"budget_schedule must be a list of points, each \(at, budget\) or"),
    ({"budget_schedule": ()}, "budget_schedule must be a list of points"),
    ({"budget_schedule": [(0.2, 0.3, 0.4)]}, r"budget_schedule must be .* but holds \(0.2, 0.3, 0.4\)"),
    ({"budget_schedule": [{"at": 0.2, "level": 0.3}]}, "budget_schedule must be .* but holds {'at': 0.2, 'level'"),
    ({"budget_schedule": [(1.5, 0.3)]}, r"at must be a share of the run in \[0, 1\], but is 1.5"),
    ({"budget_schedule": [(0.5, 0.01)]}, "from 1 / kv_block_size = 0.015625 .* to 1 .* but is 0.01 at 0.5"),
    ({"budget_schedule": [(0.5, [0.1, 1.2])]}, "but is 1.2 at 0.5"),
    ({"budget_schedule": [(0.5, [])]}, "a number or one a layer, but is"),
    ({"budget_schedule": [(0.5, True)]}, "but is True at 0.5"),
    ({"budget_schedule": [(0.5, 0.1), (0.5, 0.2)]}, "one point a place, but has two at 0.5"),
    ({"budget_schedule": [(0.5, 0.1), (0.7, [0.2, 0.1])]}, "gives one at 0.5 and 2 at 0.7"),
    ({"budget_schedule": [{"at": 0.5, "budget": 0.1, "expert": 2}]}, "expert must be a transformer's name"),
    ({"budget_schedule": [(0.5, 0.1)], "rule": "topk"}, "only rule='budget' reads it"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_what_breaks_a_rule_is_named_with_the_rule(values, message):
    with pytest.raises(ValueError, match=f"PSAConfig: .*{message}"):
        PSAConfig(**values)


def test_unknown_settings_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown settings bugdet; known ones are query_block_size, .*seed"):
        PSAConfig.from_dict({"bugdet": 0.2})
    with pytest.raises(ValueError, match="expected a mapping"):
        PSAConfig.from_dict([1])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("a.yaml", "a: [", "not valid YAML"), ("a.json", "{", "not valid JSON"), ("a.yaml", "- 1", "must hold a mapping")],
)
def test_files_that_hold_no_config(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        PSAConfig.load(tmp_path / name)


def test_files_of_another_kind_or_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"\.yaml, \.yml or \.json"):
        PSAConfig().save(tmp_path / "config.txt")
    with pytest.raises(FileNotFoundError):
        PSAConfig.load(tmp_path / "none.yaml")


def test_presets_are_the_papers():
    presets = PSAConfig.presets()
    assert set(presets) >= {"default", "psa-1", "psa-2", "psa-3", "psa-4", "psa-5", "psa-threshold"}
    assert all(presets.values()), "every preset says what it is"
    for number in range(1, 6):
        config = PSAConfig.preset(f"psa-{number}")
        budget = sum(share / 2**level for level, share in enumerate(config.level_fractions))
        assert budget == pytest.approx(0.25), "the paper compares them at one compute budget (appendix)"
        assert config.importance_reduction == "max"
    assert PSAConfig.preset("psa-3").level_fractions == (0.15, 0.10, 0.20, 0.0)
    assert PSAConfig.preset("psa-threshold").level_thresholds == (0.7, 0.8, 0.9, 0.9)


@pytest.mark.parametrize("name", ["psa-9", "", "../pyproject", "psa-3.yaml"])
def test_an_unknown_preset_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=r"no preset .*; there are allegro, .*, psa-1, .*, wan-5b"):
        PSAConfig.preset(name)

"""What a row holds beyond times: stages, rivals, rounding errors."""

import json
import sys

import pytest
import torch

from psa_diffusers.backends.reference import attend_reference
from psa_diffusers.benchmark import BenchCase, Extras, measure
from psa_diffusers.benchmark.official import find_package, level_shares, mask_ratios
from psa_diffusers.benchmark.rivals import sdpa
from psa_diffusers.benchmark.rounding import rounding_errors
from psa_diffusers.benchmark.sparse_rivals import binary_plan, flex_block_mask
from psa_diffusers.benchmark.stages import LaunchTimer, attention_seconds
from psa_diffusers.config import PSAConfig
from psa_diffusers.planning import Plan, build_plan
from psa_diffusers.synthetic import video_like_qkv

CASE = BenchCase((2, 8, 16), PSAConfig(compute_budget=0.3), heads=2, head_dim=32)

AUTHORS = """
from dataclasses import dataclass
import torch

print("loud at import")

class Settings:
    def __init__(self, **given):
        self.__dict__.update(given)

class PyramidSparseAttention:
    def __init__(self, config, layer_num):
        print("loud when made")
        assert (config.width, config.height, config.depth) == (16, 8, 2)
        assert config.mask_ratios[1][0] == 0 and config.mask_ratios[0][1] == 1
        self.sparse_attention_fn = lambda query, key, value, lists, scale: (
            torch.nn.functional.scaled_dot_product_attention(query, key, value)
        )
    def __call__(self, query, key, value, layer):
        assert query.shape == (1, 2, 256, 32)
        return self.sparse_attention_fn(query, key, value, "lists", None)

AttentionConfig = Settings
"""


@pytest.fixture
def authors(tmp_path, monkeypatch):
    """Stands in for a checkout of the authors' repository; gives the folder and a way to write its package."""

    def write(text):
        package = tmp_path / "src" / "psa_triton"
        (package / "utils").mkdir(parents=True)
        (package / "__init__.py").write_text(text)
        (package / "utils" / "__init__.py").write_text("def calc_density_newtype(lists): return 0.25, [0.25]\n")
        return tmp_path

    monkeypatch.setattr(sys, "path", list(sys.path))
    yield write
    for name in [name for name in sys.modules if name.split(".")[0] == "psa_triton"]:
        del sys.modules[name]


def test_official_is_timed_in_full_and_with_its_lists_given(authors, capsys):
    row = measure(CASE, 2, extras=Extras(official=authors(AUTHORS)))
    rivals, budgets, speedups = (json.loads(row[name]) for name in ("rivals", "rivals_budget", "speedups"))
    assert list(rivals) == ["sdpa", "official, whole", "official, plan given"]
    assert budgets == {"official, whole": 0.25, "official, plan given": 0.25}
    assert speedups["official, whole"] == pytest.approx(rivals["official, whole"] / row["sparse_median"], rel=1e-4)
    given = "official, plan given"  # to be compared with attention alone
    assert speedups[given] == pytest.approx(rivals[given] / row["attend_median"], rel=1e-4)
    errors = json.loads(row["rivals_error"])
    assert list(errors) == ["official, whole"]  # the other's output is in another order
    assert errors["official, whole"] < 1e-5  # the stand-in is dense
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("import no_such_module_of_theirs", "ModuleNotFoundError: No module named 'no_such_module_of_theirs'"),
        (AUTHORS.replace("class PyramidSparseAttention", "class SomethingElse"), "AttributeError: module 'psa_triton'"),
    ],
)
def test_official_that_does_not_run_is_missing_with_the_reason(authors, text, why):
    row = measure(CASE, 1, extras=Extras(official=authors(text)))
    assert list(json.loads(row["rivals"])) == ["sdpa"]
    assert json.loads(row["rivals_missing"])["official"].startswith(why)


def test_official_takes_no_text(authors):
    case = BenchCase((2, 8, 16), PSAConfig(), heads=1, head_dim=32, text_tokens=3)
    row = measure(case, 1, extras=Extras(official=authors(AUTHORS)))
    assert json.loads(row["rivals_missing"]) == {"official": "ValueError: it is timed without text tokens only"}


def test_official_checkout_is_recognised(authors, tmp_path):
    with pytest.raises(ValueError, match="holds no src/psa_triton"):
        find_package(tmp_path)
    assert find_package(authors(AUTHORS)) == tmp_path / "src"


@pytest.mark.parametrize("budget", [0.05, 0.1, 0.15, 0.25, 0.42, 0.6, 1.0])
def test_official_shares_cost_the_budget(budget):
    shares = level_shares(budget)
    assert sum(share / factor for factor, share in shares.items()) == pytest.approx(budget)
    assert sum(shares.values()) <= 1 + 1e-12 and min(shares.values()) >= 0
    ratios = mask_ratios(shares)
    assert [ratios[factor] for factor in (1, 0)] == [(0.0, shares[1]), (pytest.approx(sum(shares.values())), 1.0)]
    for (_, stop), (start, _) in zip(list(ratios.values()), list(ratios.values())[1:], strict=False):
        assert stop == start


def test_official_shares_at_their_default_budget_are_their_defaults():
    assert level_shares(0.15) == pytest.approx({1: 0.10, 2: 0.05, 4: 0.0, 8: 0.20})


def test_what_a_cpu_has_not_is_missing_with_the_reason():
    row = measure(CASE, 1, extras=Extras(naive=True))
    assert json.loads(row["rivals_missing"])["naive psa"].startswith("ValueError: the tensors are on cpu, not on a")
    assert row["naive_level_1"] is None


def test_stages_of_a_cpu_are_the_calls():
    row = measure(CASE, 2, extras=Extras(stages=True))
    assert json.loads(row["stages"]) == {
        "plan": pytest.approx(row["plan_median"], rel=1e-4),
        "attend": pytest.approx(row["attend_median"], rel=1e-4),
    }
    assert row["gpu_dense"] is None and row["kernel_tflops"] is None
    assert measure(CASE, 1)["stages"] is None


class _Event:
    """Counts on at every recording."""

    now = 0.0

    def record(self):
        _Event.now += 1.0
        self.time = _Event.now

    def elapsed_time(self, other):
        return 1e3 * (other.time - self.time)


class _Metadata:
    def __init__(self, name):
        self.name = name

    def get(self):
        return {"name": self.name}


def test_launches_are_timed_by_kernel_and_hooks_go_away():
    from triton import knobs

    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    with LaunchTimer(_Event) as timer:
        for name in ("pyramid_kernel", "attention_kernel", "pyramid_kernel"):
            enter(_Metadata(name))
            if name == "attention_kernel":
                _Event.now += 5.0
            leave(_Metadata(name))
    enter(_Metadata("unseen"))
    leave(_Metadata("unseen"))
    assert timer.seconds() == {"pyramid_kernel": 2.0, "attention_kernel": 6.0}


def test_a_single_hook_of_older_triton_comes_back(monkeypatch):
    from types import SimpleNamespace

    from triton import knobs

    runtime = SimpleNamespace(launch_enter_hook=None, launch_exit_hook="theirs")
    monkeypatch.setattr(knobs, "runtime", runtime)
    with LaunchTimer(_Event) as timer:
        runtime.launch_enter_hook(_Metadata("one"))
        runtime.launch_exit_hook(_Metadata("one"))
    assert timer.seconds() == {"one": 1.0}
    assert (runtime.launch_enter_hook, runtime.launch_exit_hook) == (None, "theirs")


def test_attention_kernels_are_told_from_the_rest():
    stages = {name: {"median": 1.0} for name in ("attend", "hopper_attention_kernel", "pyramid_kernel", "whole")}
    assert attention_seconds(stages) == 1.0


def test_binary_plan_reads_blocks_in_full_or_not_at_all():
    inputs = video_like_qkv(1, CASE.grid, CASE.heads, CASE.head_dim)
    plan = binary_plan(CASE, inputs)
    assert set(plan.level_mask.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("value_correction", ["none", "covariance"])
def test_rounding_error_is_that_of_the_number_format_alone(value_correction):
    """On a plan that leaves much out: against dense attention the error would be a hundred times as much."""
    config = PSAConfig(compute_budget=0.1, value_correction=value_correction)
    grid, heads = (4, 8, 16), 5
    exact = video_like_qkv(1, grid, heads, 32, dtype=torch.float64)
    plan = build_plan(*exact, config, grid=grid)
    settings = {"scale": 32**-0.5, "logit_correction": "variance", "value_correction": value_correction}
    rounded = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        inputs = tuple(tensor.to(torch.bfloat16).to(dtype) for tensor in exact)
        out, _ = attend_reference(*inputs, plan, **settings)
        rounded[dtype] = rounding_errors(inputs, out, plan, config, sdpa)
    assert rounded[torch.float64]["sparse_error"] < 1e-14
    assert 1e-9 < rounded[torch.float32]["sparse_error"] < 1e-5
    assert 1e-4 < rounded[torch.bfloat16]["sparse_error"] < 2e-2
    assert 1e-4 < rounded[torch.bfloat16]["dense_error"] < 2e-2
    found = rounded[torch.bfloat16]
    assert found["error_ratio"] == found["sparse_error"] / found["dense_error"]


def test_flex_reads_what_the_plan_reads():
    mask = torch.zeros(1, 2, 3, 5, dtype=torch.int8)
    mask[0, 0, 1, [0, 3]] = 1
    mask[0, 1, 2] = 1
    lengths = (300, 290)  # the last blocks are short
    plan = Plan(mask, *lengths, query_block_size=128, kv_block_size=64, num_levels=4)
    block_mask = flex_block_mask(plan)
    assert torch.equal(block_mask.to_dense(), mask.to(torch.int32))
    assert block_mask.shape[-2:] == lengths  # FlexAttention refuses tensors of other lengths


def test_flex_is_given_its_plan(monkeypatch):
    # Not compiled: it takes minutes, and a C++ compiler.
    monkeypatch.setattr("psa_diffusers.benchmark.sparse_rivals.flex_attention", lambda *plan: sdpa)
    row = measure(CASE, 1, extras=Extras(flex=True))
    assert json.loads(row["rivals_missing"]) == {}
    name = "flex, binary mask"
    assert json.loads(row["rivals_budget"])[name] == pytest.approx(0.3, abs=0.1)
    seconds = json.loads(row["rivals"])[name]
    assert json.loads(row["speedups"])[name] == pytest.approx(seconds / row["attend_median"], rel=1e-4)


def test_rounding_is_in_the_row():
    row = measure(CASE, 1, extras=Extras(rounding=True))
    assert 0 < row["sparse_error"] < 1e-5 and row["relative_error"] > 0.01
    assert measure(CASE, 1)["error_ratio"] is None


def test_replayed_launches_are_seen_too(monkeypatch):
    """Recipes call compiled kernels without Triton's own launcher: the hooks are theirs to call."""
    from types import SimpleNamespace

    from psa_diffusers.gpu import recipe

    calls = []

    def run(*arguments):
        *grid_and_kernel, facts, entered, left, argument = arguments
        if entered is not None:
            entered(facts)
        calls.append((grid_and_kernel, entered is not None, argument))
        if left is not None:
            left(facts)

    compiled = SimpleNamespace(
        run=run,
        function="function",
        packed_metadata="packed",
        launch_metadata=lambda grid, stream, *arguments: _Metadata("replayed_kernel"),
    )
    step = recipe._Step(SimpleNamespace(grid=(4, 1, 1)), compiled, [7], [])
    monkeypatch.setattr(recipe, "_current_stream", lambda device: "stream")
    with LaunchTimer(_Event) as timer:
        recipe._launch_all([step], [], torch.device("cuda"), recipe.launch_hooks())
    recipe._launch_all([step], [], torch.device("cuda"), recipe.launch_hooks())
    assert timer.seconds() == {"replayed_kernel": 1.0}
    assert calls == [([4, 1, 1, "stream", "function", "packed"], seen, 7) for seen in (True, False)]


@pytest.mark.parametrize("kernel", ["hopper_attention_kernel", None])
def test_columns_of_a_gpu(monkeypatch, kernel):
    """And a call without an attention kernel of Triton's is reported, not passed over."""
    from dataclasses import replace

    from psa_diffusers.benchmark import measuring

    seconds = {"dense": 0.2, "plan": 0.01, "attend": 0.03, "whole": 0.05, "pyramid_kernel": 0.002, "rest": 0.0}
    seconds |= {} if kernel is None else {kernel: 0.025}
    stages = {name: {"median": taken} for name, taken in seconds.items()}
    monkeypatch.setattr(measuring, "measure_stages", lambda *arguments: stages)
    row = {"achieved_budget": 0.5, "rivals_missing": {}}
    case = replace(CASE, device="cuda")
    found = measuring._gpu_columns(case, {}, 3, Extras(stages=True), row)
    assert found["gpu_speedup"] == pytest.approx(4.0) and found["stages"] is stages
    if kernel is None:
        assert found["kernel_tflops"] is None and list(row["rivals_missing"]) == ["stages"]
    else:
        assert found["kernel_tflops"] == pytest.approx(case.dense_flops * 0.5 / 0.025 / 1e12)
        assert found["overhead_share"] == pytest.approx(0.125) and row["rivals_missing"] == {}

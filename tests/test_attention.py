"""pyramid_sparse_attention: planning, dispatch, and every documented error."""

import dataclasses
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from psa_diffusers import PSAConfig, build_plan, pyramid_sparse_attention
from psa_diffusers.backends import choose_backend, get_backend
from psa_diffusers.synthetic import video_like_qkv

GRID = (4, 8, 8)
CONFIG = PSAConfig(query_block_size=32, kv_block_size=16, num_levels=3, compute_budget=0.4)


@pytest.fixture(scope="module")
def qkv():
    return video_like_qkv(2, GRID, 2, 32)


@pytest.fixture(scope="module")
def plan(qkv):
    return build_plan(*qkv, CONFIG, grid=GRID)


def dense(query, key, value):
    return F.scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in (query, key, value))).transpose(1, 2)


def test_plans_when_no_plan_is_given(qkv, plan):
    assert torch.equal(
        pyramid_sparse_attention(*qkv, CONFIG, grid=GRID), pyramid_sparse_attention(*qkv, CONFIG, plan=plan)
    )


def test_whole_budget_is_dense(qkv):
    config = dataclasses.replace(CONFIG, compute_budget=1.0)
    torch.testing.assert_close(pyramid_sparse_attention(*qkv, config, grid=GRID), dense(*qkv))


def test_higher_budget_is_closer_to_dense(qkv):
    errors = [
        (pyramid_sparse_attention(*qkv, dataclasses.replace(CONFIG, compute_budget=x), grid=GRID) - dense(*qkv)).norm()
        for x in (0.1, 0.3, 0.6)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] > 0


def test_backends_agree(qkv, plan):
    outputs = [
        pyramid_sparse_attention(*qkv, dataclasses.replace(CONFIG, backend=name), plan=plan, return_lse=True)
        for name in ("reference", "torch")
    ]
    for expected, found in zip(*outputs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("correction", [{"logit_correction": "variance"}, {"value_correction": "covariance"}], ids=str)
def test_corrections_reach_the_backend(qkv, plan, correction):
    plain = dataclasses.replace(CONFIG, logit_correction="none", value_correction="none")
    config = dataclasses.replace(plain, **correction)
    plain, corrected = (pyramid_sparse_attention(*qkv, c, plan=plan) for c in (plain, config))
    assert not torch.equal(plain, corrected)


def test_key_lengths_as_list_and_tensor(qkv):
    lengths = [200, 256]
    by_list = pyramid_sparse_attention(*qkv, CONFIG, grid=GRID, key_lengths=lengths)
    assert torch.equal(
        by_list, pyramid_sparse_attention(*qkv, CONFIG, grid=GRID, key_lengths=torch.tensor(lengths, dtype=torch.int32))
    )
    plan = build_plan(*qkv, CONFIG, grid=GRID, key_lengths=lengths)
    for again in (None, lengths):
        assert torch.equal(by_list, pyramid_sparse_attention(*qkv, CONFIG, plan=plan, key_lengths=again))


def test_full_tokens_are_read_at_full_resolution(qkv):
    extended = [torch.cat([tensor, tensor[:, :9]], 1) for tensor in qkv]
    out = pyramid_sparse_attention(*extended, CONFIG, grid=GRID, full_tokens=slice(256, None))
    assert out.shape == extended[0].shape
    torch.testing.assert_close(out[:, 256:], dense(*extended)[:, 256:], rtol=1e-4, atol=1e-5)


def test_gradients_come_from_the_reference(qkv, plan):
    query = qkv[0].clone().requires_grad_()
    assert choose_backend("auto", query) == (
        "reference",
        "Gradients are needed, and only the reference backend has them.",
    )
    for inputs in ((query, *qkv[1:]), (qkv[0], qkv[1].clone().requires_grad_(), qkv[2])):
        out = pyramid_sparse_attention(*inputs, CONFIG, plan=plan)
        out.square().sum().backward()
        leaf = next(tensor for tensor in inputs if tensor.requires_grad)
        assert leaf.grad.isfinite().all()
        assert (leaf.grad != 0).any()
    with torch.no_grad():
        assert choose_backend("auto", query)[0] != "reference"
    with pytest.raises(ValueError, match="'torch' has no gradients"):
        pyramid_sparse_attention(query, *qkv[1:], dataclasses.replace(CONFIG, backend="torch"), plan=plan)


def test_inference_mode_and_autocast_change_nothing(qkv, plan):
    expected = pyramid_sparse_attention(*qkv, CONFIG, plan=plan)
    with torch.inference_mode():
        assert torch.equal(pyramid_sparse_attention(*qkv, CONFIG, plan=plan), expected)
        assert torch.equal(pyramid_sparse_attention(*(tensor.clone() for tensor in qkv), CONFIG, plan=plan), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pyramid_sparse_attention(*qkv, CONFIG, plan=plan), expected)
        for backend in ("torch", "reference"):
            config = dataclasses.replace(CONFIG, backend=backend)
            planned = build_plan(*qkv, config)
            assert torch.equal(planned.level_mask, _outside_autocast(build_plan, *qkv, config).level_mask)
            found = pyramid_sparse_attention(*qkv, config)
            assert torch.equal(found, _outside_autocast(pyramid_sparse_attention, *qkv, config))


def _outside_autocast(function, *args):
    with torch.autocast("cpu", enabled=False):
        return function(*args)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_in_a_compiled_function_a_call_without_kernels_runs_as_it_is(qkv, backend):
    config = dataclasses.replace(CONFIG, backend=backend)
    compiled = torch.compile(lambda *tensors: 2 * pyramid_sparse_attention(*tensors, config))
    for length in (qkv[0].shape[1], qkv[0].shape[1] - 3):
        tensors = [tensor[:, :length] for tensor in qkv]
        assert torch.equal(compiled(*tensors), 2 * pyramid_sparse_attention(*tensors, config))


def test_auto_takes_torch_on_a_cpu(qkv, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    name, reason = choose_backend("auto", qkv[0])
    assert name == "torch"
    assert "cpu" in reason
    assert get_backend(name).__name__ == "attend_torch"


def test_import_is_light():
    code = "import sys, psa_diffusers; sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'triton')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


CALLS = {
    "query is no tensor": (TypeError, "query must be a torch.Tensor", lambda q, k, v: ([1.0], k, v, {})),
    "integers": (TypeError, "query must be float16", lambda q, k, v: (q.int(), k, v, {})),
    "dimensions": (ValueError, "key must have 4 dimensions", lambda q, k, v: (q, k[0], v, {})),
    "empty": (ValueError, "must not be empty", lambda q, k, v: (q[:, :0], k, v, {})),
    "key and value": (ValueError, "key and value must have", lambda q, k, v: (q, k, v[:, 1:], {})),
    "heads": (ValueError, "agree in heads", lambda q, k, v: (q, k[:, :, :1], v[:, :, :1], {})),
    "dtypes": (ValueError, "one dtype", lambda q, k, v: (q, k.half(), v, {})),
    "devices": (ValueError, "one device", lambda q, k, v: (q, k.to("meta"), v, {})),
    "scale": (TypeError, "scale must be a number", lambda q, k, v: (q, k, v, {"scale": "1"})),
    "infinite scale": (ValueError, "scale must be finite", lambda q, k, v: (q, k, v, {"scale": float("inf")})),
    "config": (TypeError, "config must be a PSAConfig", lambda q, k, v: (q, k, v, {"config": {"rule": "topk"}})),
    "grid": (ValueError, "grid must be", lambda q, k, v: (q, k, v, {"grid": (4, 8)})),
    "grid does not fit": (ValueError, "grid 4 x 8 x 9 = 288", lambda q, k, v: (q, k, v, {"grid": (4, 8, 9)})),
    "full tokens": (TypeError, "full_tokens must be", lambda q, k, v: (q, k, v, {"full_tokens": [1, 2]})),
    "full mask": (
        ValueError,
        "full_tokens as a mask must be bool",
        lambda q, k, v: (q, k, v, {"full_tokens": torch.ones(3, dtype=torch.bool)}),
    ),
    "key lengths": (
        TypeError,
        "key_lengths must hold whole numbers",
        lambda q, k, v: (q, k, v, {"key_lengths": [1.5, 2]}),
    ),
    "number of key lengths": (ValueError, "one entry a sample", lambda q, k, v: (q, k, v, {"key_lengths": [1]})),
    "key lengths beyond": (ValueError, "within 0 to 256", lambda q, k, v: (q, k, v, {"key_lengths": [1, 257]})),
    "backend": (ValueError, "backend 'triton' cannot be used", lambda q, k, v: (q, k, v, {"backend": "triton"})),
}


@pytest.mark.parametrize("name", CALLS)
def test_documented_errors(name, qkv, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kind, message, change = CALLS[name]
    *inputs, options = change(*qkv)
    config = dataclasses.replace(CONFIG, backend=options.pop("backend", "torch"))
    options = {"config": config, **options}
    with pytest.raises(kind, match=message):
        pyramid_sparse_attention(*inputs, **options)


PLANS = {
    "no plan": (TypeError, "plan must be a Plan", lambda plan: plan.level_mask),
    "batch": (ValueError, "made for batch 1", lambda plan: {"level_mask": plan.level_mask[:1]}),
    "heads": (ValueError, "made for heads 1", lambda plan: {"level_mask": plan.level_mask[:, :1]}),
    "queries": (ValueError, "made for query_length 255", lambda plan: {"query_length": 255}),
    "keys": (ValueError, "made for key_length 300", lambda plan: {"key_length": 300}),
    "blocks": (ValueError, "query_blocks, kv_blocks", lambda plan: {"level_mask": plan.level_mask[..., 1:]}),
    "dtype": (TypeError, "must be int8", lambda plan: {"level_mask": plan.level_mask.int()}),
    "device": (ValueError, "plan is on meta", lambda plan: {"level_mask": plan.level_mask.to("meta")}),
    "level": (ValueError, "0 to num_levels", lambda plan: {"level_mask": plan.level_mask + 3}),
}


@pytest.mark.parametrize("name", PLANS)
def test_plans_that_do_not_fit(name, qkv, plan):
    kind, message, change = PLANS[name]
    changes = change(plan)
    other = dataclasses.replace(plan, **changes) if isinstance(changes, dict) else changes
    with pytest.raises(kind, match=message):
        pyramid_sparse_attention(*qkv, CONFIG, plan=other)


def test_key_lengths_that_are_not_the_plans(qkv, plan):
    with pytest.raises(ValueError, match="without key_lengths"):
        pyramid_sparse_attention(*qkv, CONFIG, plan=plan, key_lengths=[3, 4])
    padded = build_plan(*qkv, CONFIG, grid=GRID, key_lengths=[200, 256])
    with pytest.raises(ValueError, match=r"key_lengths \[200, 256\], but \[3, 4\]"):
        pyramid_sparse_attention(*qkv, CONFIG, plan=padded, key_lengths=[3, 4])


def test_unknown_backend(qkv):
    with pytest.raises(ValueError, match="backend must be one of auto, reference, torch, triton"):
        choose_backend("cuda", qkv[0])

"""The kernels on a real device: run with ``pytest -m gpu tests/triton``."""

import dataclasses

import pytest
import torch

from psa_diffusers import PSAConfig
from psa_diffusers.backends.reference import attend_reference
from psa_diffusers.backends.triton import attend_triton, hopper, launch, read_lists
from psa_diffusers.gpu import graphs
from psa_diffusers.planning import Plan, build_plan
from psa_diffusers.planning.triton import planner
from tests.backends import conformance
from tests.backends.conformance import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WAN = Case(torch.bfloat16, 128, 4680, 4680, query_block_size=128, kv_block_size=64, num_levels=4, order=True)


def on_gpu(plan: Plan) -> Plan:
    moved = {
        name: None if getattr(plan, name) is None else getattr(plan, name).cuda()
        for name in ("level_mask", "order", "key_lengths", "value_gain")
    }
    return dataclasses.replace(plan, **moved, cache={})


def attend_on_gpu(query, key, value, plan, **options):
    """``attend_triton`` over there, for tensors from here."""
    out, lse = attend_triton(query.cuda(), key.cuda(), value.cuda(), on_gpu(plan), **options)
    return out.cpu(), None if lse is None else lse.cpu()


@pytest.mark.parametrize("case", conformance.cases(*DTYPES), ids=str)
@pytest.mark.parametrize("check", conformance.CHECKS)
def test_conforms(check, case):
    check(attend_on_gpu, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", conformance.full_matrix(*DTYPES), ids=str)
def test_full_matrix(case):
    conformance.check_random_plans(attend_on_gpu, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("correction", ["none", "variance"])
def test_agrees_at_the_size_of_a_video(dtype, correction):
    case = dataclasses.replace(WAN, dtype=dtype)
    inputs, plan = conformance.make_inputs(case), conformance.make_plan(case)
    conformance.assert_agrees_with_reference(attend_on_gpu, case, inputs, plan, logit_correction=correction)


@pytest.mark.parametrize("layout", ["heads first", "channels apart", "expanded batch"])
def test_strides_do_not_matter(layout):
    case = dataclasses.replace(WAN, query_length=500, key_length=500, batch=2)
    plan = on_gpu(conformance.make_plan(case))
    inputs = [tensor.cuda() for tensor in conformance.make_inputs(case)]
    if layout == "heads first":
        variant = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in inputs]
    elif layout == "channels apart":
        variant = [torch.stack((tensor, torch.full_like(tensor, torch.nan)), -1)[..., 0] for tensor in inputs]
    else:
        variant = [tensor[:1].expand(2, -1, -1, -1) for tensor in inputs]
        inputs = [tensor.contiguous() for tensor in variant]
    expected, expected_lse = attend_triton(*inputs, plan, scale=case.scale, return_lse=True)
    out, lse = attend_triton(*variant, plan, scale=case.scale, return_lse=True)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("corrections", [("none", "none"), ("none", "covariance"), ("variance", "covariance")])
def test_both_kernels_agree(monkeypatch, corrections):
    """The Hopper kernel and the one for all GPUs, on one plan; elsewhere the second alone, twice."""
    inputs, plan = [tensor.cuda() for tensor in conformance.make_inputs(WAN)], on_gpu(conformance.make_plan(WAN))
    named = dict(zip(("logit_correction", "value_correction"), corrections, strict=True))
    options = {"scale": WAN.scale, "return_lse": True, **named}
    found = attend_triton(*inputs, plan, **options)
    monkeypatch.setattr(hopper, "ENABLED", False)
    expected = attend_triton(*inputs, plan, **options)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=2e-2)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-4)


def test_nothing_waits_for_the_device():
    inputs = [tensor.cuda() for tensor in conformance.make_inputs(WAN)]
    plan = on_gpu(conformance.make_plan(WAN))
    attend_triton(*inputs, plan, scale=WAN.scale)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):  # as launches, as a graph that is made, and as one that is there
            plan.cache.clear()
            attend_triton(*inputs, plan, scale=WAN.scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_in_a_cuda_graph():
    inputs = [tensor.cuda() for tensor in conformance.make_inputs(WAN)]
    plan = on_gpu(conformance.make_plan(WAN))
    expected, _ = attend_triton(*inputs, plan, scale=WAN.scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = attend_triton(*inputs, plan, scale=WAN.scale)
    graph.replay()
    assert torch.equal(out, expected)


def test_fresh_memory_is_not_read():
    """Buffers are allocated, not cleared: what the allocator's pool held before must not show."""
    case = dataclasses.replace(WAN, query_length=300, key_length=300)
    inputs, plan = [tensor.cuda() for tensor in conformance.make_inputs(case)], conformance.make_plan(case)
    expected, _ = attend_triton(*inputs, on_gpu(plan), scale=case.scale)
    poison = [torch.full((2**22,), torch.nan, device="cuda") for _ in range(8)]
    del poison
    out, _ = attend_triton(*inputs, on_gpu(plan), scale=case.scale)
    assert torch.equal(out, expected)


def test_offsets_beyond_32_bits():
    """Keys, queries and outputs of more than 2**31 numbers: the last head and the last tokens are still right."""
    length, heads, head_dim = 131_328, 128, 128
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    query = torch.randn(1, length, heads, head_dim, dtype=torch.bfloat16, device="cuda")
    assert query.numel() > 2**31
    mask = torch.zeros(1, heads, length // 128, length // 64, dtype=torch.int8, device="cuda")
    mask[..., -3:] = 1
    mask[..., 0] = 4
    plan = Plan(mask, length, length, 128, 64, 4)
    out, _ = attend_triton(query, query, query, plan, scale=head_dim**-0.5)
    rows = torch.cat((torch.arange(64), torch.arange(length - 192, length))).cuda()
    part = query[:, rows, -1:]
    small = torch.zeros(1, 1, 1, 4, dtype=torch.int8, device="cuda")
    small[..., 0], small[..., 1:] = 4, 1
    tail = part[:, -128:]
    expected, _ = attend_reference(tail, part, part, Plan(small, 128, 256, 128, 64, 4), scale=head_dim**-0.5)
    torch.testing.assert_close(out[:, -128:, -1:], expected, rtol=2e-2, atol=2e-2)


def forget_recipes():
    for module in (launch, read_lists, planner):
        module._RECIPES = type(module._RECIPES)()


@pytest.mark.parametrize("correction", ["none", "covariance"])
@pytest.mark.parametrize("hopper_kernel", [True, False])
def test_replayed_calls_give_what_recorded_ones_do(monkeypatch, correction, hopper_kernel):
    """Plan and output of tensors in other places, of other strides and dtypes, between calls of other shapes."""
    monkeypatch.setattr(hopper, "ENABLED", hopper_kernel)
    config = PSAConfig(value_correction=correction)
    calls = []
    for seed, (heads, dtype) in enumerate([(2, torch.bfloat16), (3, torch.bfloat16), (2, torch.float16)] * 3):
        fused = torch.randn(1, 2048 + 256 * (seed == 7), heads, 3 * 64, generator=torch.Generator().manual_seed(seed))
        fused = fused.to("cuda", dtype)
        parts = fused.chunk(3, -1)
        calls.append(parts if seed % 2 else tuple(part.contiguous() for part in parts))

    def run(tensors):
        plan = build_plan(*tensors, config)
        out, lse = attend_triton(*tensors, plan, scale=0.125, value_correction=correction, return_lse=True)
        return plan.level_mask, plan.level_counts(), out, lse

    expected = []
    for tensors in calls:
        forget_recipes()
        expected.append(run(tensors))
    forget_recipes()
    for _ in range(2):
        for tensors, (levels, counts, out, lse) in zip(calls, expected, strict=True):
            found = run(tensors)
            assert torch.equal(found[0], levels) and torch.equal(found[1], counts)
            assert torch.equal(found[2], out) and torch.equal(found[3], lse)
            by_definition = dataclasses.replace(build_plan(*tensors, config), cache={}).level_counts()
            assert torch.equal(counts, by_definition)


@pytest.mark.parametrize("hopper_kernel", [True, False])
def test_calls_over_the_same_memory_become_graphs(monkeypatch, hopper_kernel):
    """They give what launches give, for what is in the memory now, also on another stream."""
    monkeypatch.setattr(hopper, "ENABLED", hopper_kernel)
    tensors = torch.empty(3, 2, 2048, 3, 64, dtype=torch.bfloat16, device="cuda").unbind(0)
    config = PSAConfig(value_correction="covariance")

    def run(seed: int) -> tuple[torch.Tensor, ...]:
        for tensor in tensors:
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)))
        plan = build_plan(*tensors, config)
        out, lse = attend_triton(*tensors, plan, scale=0.125, value_correction="covariance", return_lse=True)
        return plan.level_mask.cpu(), plan.level_counts().cpu(), out.cpu(), lse.cpu()

    monkeypatch.setattr(graphs, "ENABLED", False)
    expected = [run(seed) for seed in range(3)]
    monkeypatch.setattr(graphs, "ENABLED", True)
    forget_recipes()
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for seed in (0, 1, 2) * 3:
                assert all(map(torch.equal, run(seed), expected[seed]))
    recipes = [known for module in (launch, read_lists, planner) for known, _ in module._RECIPES._known.values()]
    assert len(recipes) >= 3 and all(known._graphs._used > 0 for known in recipes)


@pytest.mark.parametrize("tokens, heads, head_dim", [(32760, 12, 128), (17776, 48, 64)])
def test_memory_beside_keys_and_values(tokens, heads, head_dim):
    """Planning included: less than keys and values take."""
    query, key, value = torch.randn(3, 1, tokens, heads, head_dim, dtype=torch.bfloat16, device="cuda").unbind(0)
    config = PSAConfig()
    for _ in range(2):  # the first call keeps every buffer
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        plan = build_plan(query, key, value, config)
        out, _ = attend_triton(query, key, value, plan, scale=0.1, value_correction="covariance")
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before - out.nbytes
        del plan, out
    assert extra < 0.95 * (key.nbytes + value.nbytes)

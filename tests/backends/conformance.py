"""What every backend must do, as checks that take its attend function and a case.

The float64 reference is the truth. A backend may err twice as much as plain torch (the reference run in its dtype),
plus four roundings, since plain torch is sometimes exact by luck. Of float64 itself 64 roundings are asked.

    @pytest.mark.parametrize("case", conformance.cases(torch.float32, torch.float16), ids=str)
    @pytest.mark.parametrize("check", conformance.CHECKS)
    def test_conforms(check, case):
        check(attend, case)
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from psa_diffusers.backends.reference import attend_reference
from psa_diffusers.planning import Plan


@dataclass(frozen=True)
class Case:
    """Sizes of one test. ``order`` needs as many queries as keys."""

    dtype: torch.dtype = torch.float32
    head_dim: int = 64
    query_length: int = 200
    key_length: int = 200
    query_block_size: int = 64
    kv_block_size: int = 32
    num_levels: int = 3
    batch: int = 1
    heads: int = 2
    order: bool = False

    def __str__(self) -> str:
        blocks = f"{self.query_block_size}x{self.kv_block_size}x{self.num_levels}"
        lengths = f"{self.query_length}x{self.key_length}" + ("-order" if self.order else "")
        return f"{str(self.dtype).removeprefix('torch.')}-d{self.head_dim}-{blocks}-{lengths}"

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


_SHAPES = (
    Case(
        head_dim=64, query_block_size=128, kv_block_size=64, num_levels=4, query_length=300, key_length=300, order=True
    ),
    Case(head_dim=32, query_block_size=16, kv_block_size=16, num_levels=4, query_length=70, key_length=131, batch=2),
    Case(head_dim=80, query_block_size=64, kv_block_size=32, num_levels=3, query_length=129, key_length=97),
    Case(head_dim=96, query_block_size=32, kv_block_size=64, num_levels=2, query_length=97, key_length=97, order=True),
    Case(head_dim=128, query_block_size=128, kv_block_size=128, num_levels=4, query_length=257, key_length=255),
    Case(head_dim=256, query_block_size=64, kv_block_size=64, num_levels=1, query_length=65, key_length=190),
    Case(query_block_size=32, kv_block_size=64, num_levels=6, query_length=100, key_length=100, order=True),
    Case(head_dim=64, query_length=1, key_length=1),
    Case(head_dim=64, query_length=1, key_length=77),
    Case(head_dim=64, query_length=77, key_length=1),
)


def cases(*dtypes: torch.dtype) -> list[Case]:
    """The default cases: each shape in the first dtype, the first three and the one-token one in all."""
    few = (*_SHAPES[:3], _SHAPES[7])
    rest = [replace(shape, dtype=dtype) for dtype in dtypes[1:] for shape in few]
    return [replace(shape, dtype=dtypes[0]) for shape in _SHAPES] + rest


def full_matrix(*dtypes: torch.dtype) -> list[Case]:
    """Block sizes x levels x head dims x dtypes x lengths: for slow runs."""
    blocks = [(128, 64), (64, 64), (32, 128), (128, 32), (16, 16), (256, 64)]
    lengths = [(385, 385), (130, 385), (64, 63)]
    found = []
    for dtype, head_dim, (query_block, kv_block), levels, (queries, keys) in itertools.product(
        dtypes, (32, 64, 80, 96, 128, 256), blocks, (1, 2, 3, 4, 5), lengths
    ):
        if kv_block > 2 ** (levels - 1):
            order = queries == keys and head_dim % 64 == 0
            found.append(Case(dtype, head_dim, queries, keys, query_block, kv_block, levels, order=order))
    return found


# -- inputs -----------------------------------------------------------------------------------------------------------


def make_inputs(case: Case, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values whose neighbours are alike, so that pooled groups have a direction of their own."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> Tensor:
        shape = (case.batch, length, case.heads, case.head_dim)
        trend = torch.randn(case.batch, -(-length // 8), case.heads, case.head_dim, generator=generator)
        own = torch.randn(shape, generator=generator)
        return (trend.repeat_interleave(8, 1)[:, :length] + 0.7 * own).to(case.dtype)

    return tokens(case.query_length), tokens(case.key_length), tokens(case.key_length)


def make_plan(
    case: Case, level: int | None = None, *, seed: int = 0, lowest: int = 0, key_lengths: list[int] | None = None
) -> Plan:
    """All pairs at ``level``; or levels drawn evenly from ``lowest`` to the centroid."""
    generator = torch.Generator().manual_seed(seed + 1)
    query_blocks = -(-case.query_length // case.query_block_size)
    kv_blocks = -(-case.key_length // case.kv_block_size)
    shape = (case.batch, case.heads, query_blocks, kv_blocks)
    if level is None:
        mask = torch.randint(lowest, case.num_levels + 2, shape, generator=generator, dtype=torch.int8)
    else:
        mask = torch.full(shape, level, dtype=torch.int8)
    order = torch.randperm(case.key_length, generator=generator) if case.order else None
    return Plan(
        level_mask=mask,
        query_length=case.query_length,
        key_length=case.key_length,
        query_block_size=case.query_block_size,
        kv_block_size=case.kv_block_size,
        num_levels=case.num_levels,
        order=order,
        key_lengths=None if key_lengths is None else torch.tensor(key_lengths),
    )


# -- comparison -------------------------------------------------------------------------------------------------------


def assert_as_exact_as_plain_torch(
    found: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype, what: str, *, roundings: float | None = None
) -> None:
    """``found`` errs at most twice as much as ``plain``, beyond a few roundings of the largest number."""
    assert found.shape == truth.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(truth.shape)}"
    finite = truth.isfinite()
    assert torch.equal(found.double()[~finite], truth[~finite]), f"{what}: differs where the truth is infinite"
    if not finite.any():
        return
    error, allowed = ((tensor.double() - truth)[finite].abs().max().item() for tensor in (found, plain))
    rounding = torch.finfo(dtype).eps * max(1.0, truth[finite].abs().max().item())
    roundings = roundings or (64 if dtype == torch.float64 else 4)
    assert error <= 2 * allowed + roundings * rounding, f"{what}: error {error:.3g}, plain torch's {allowed:.3g}"


def assert_agrees_with_reference(attend, case: Case, inputs, plan: Plan, **options) -> None:
    """Output and lse against the float64 reference."""
    options = {"scale": case.scale, "return_lse": True, **options}
    out, lse = attend(*inputs, plan, **options)
    plain_out, plain_lse = attend_reference(*inputs, plan, **options)
    true_out, true_lse = attend_reference(*(tensor.double() for tensor in inputs), plan, **options)
    assert out.dtype == case.dtype
    assert lse.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
    assert_as_exact_as_plain_torch(out, plain_out, true_out, case.dtype, "output")
    # Both round pooled keys to the inputs' dtype, which moves a logit by a part of a rounding there. Where there are
    # but two numbers, as with one query, plain torch's error can be small by luck.
    dtype, roundings = (lse.dtype, None) if case.dtype.itemsize >= 4 else (case.dtype, 0.25)
    assert_as_exact_as_plain_torch(lse, plain_lse, true_lse, dtype, "lse", roundings=roundings)


def dense(query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Dense attention [batch, seq, heads, head_dim] and its lse, from the formula; bias [keys] on the logits."""
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key).to(torch.float64) * scale
    logits = logits if bias is None else logits + bias
    weights = logits.softmax(-1).to(query.dtype)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value), logits.logsumexp(-1)


# -- the checks -------------------------------------------------------------------------------------------------------


def check_level_one_is_dense(attend, case: Case) -> None:
    """1. A plan of nothing but level 1 is dense attention."""
    inputs, plan = make_inputs(case), make_plan(case, level=1)
    out, lse = attend(*inputs, plan, scale=case.scale, return_lse=True)
    plain = dense(*inputs, case.scale)
    truth = dense(*(tensor.double() for tensor in inputs), case.scale)
    assert_as_exact_as_plain_torch(out, plain[0], truth[0], case.dtype, "output")
    assert_as_exact_as_plain_torch(lse, plain[1], truth[1], lse.dtype, "lse")


def check_pooled_levels(attend, case: Case) -> None:
    """2. A plan of one level throughout is dense attention on keys and values averaged over groups."""
    query, key, value = make_inputs(case)
    for level in range(2, case.num_levels + 2):
        plan = make_plan(case, level=level)
        size = case.kv_block_size if level > case.num_levels else 2 ** (level - 1)
        counts = torch.bincount(torch.arange(case.key_length) // size)

        def pooled(tokens: Tensor, plan=plan, size=size) -> Tensor:
            tokens = tokens if plan.order is None else tokens[:, plan.order]
            channels = tokens.double().permute(0, 2, 3, 1).flatten(0, 1)
            means = torch.nn.functional.avg_pool1d(channels, size, ceil_mode=True, count_include_pad=False)
            return means.unflatten(0, (case.batch, case.heads)).permute(0, 3, 1, 2)

        coarse = pooled(key), pooled(value)
        truth = dense(query.double(), *coarse, case.scale, counts.double().log())
        plain = dense(query, *(tensor.to(case.dtype) for tensor in coarse), case.scale, counts.double().log())
        out, lse = attend(query, key, value, plan, scale=case.scale, return_lse=True)
        assert_as_exact_as_plain_torch(out, plain[0], truth[0], case.dtype, f"output of level {level}")
        assert_as_exact_as_plain_torch(lse, plain[1], truth[1], lse.dtype, f"lse of level {level}")


def check_random_plans(attend, case: Case) -> None:
    """3. Any mix of levels, centroids and skips, in any order; with few blocks some rows are empty."""
    for seed in range(3):
        assert_agrees_with_reference(attend, case, make_inputs(case, seed), make_plan(case, seed=seed))


def check_variance_correction(attend, case: Case) -> None:
    """3b. The same with the variance added to the logits of pooled keys; large queries reach the clamp; padding."""
    query, key, value = make_inputs(case)
    lengths = [max(1, case.key_length - 3 * sample - 5) for sample in range(case.batch)]
    for gain, key_lengths in ((1.0, None), (3.0, None), (1.0, lengths)):
        inputs = ((gain * query).to(case.dtype), key, value)
        plan = make_plan(case, key_lengths=key_lengths)
        assert_agrees_with_reference(attend, case, inputs, plan, logit_correction="variance")


def check_variance_of_padded_queries(attend, case: Case) -> None:
    """3c. With as many queries as keys, queries that are padding, be they NaN, do not move others through it."""
    case = replace(case, query_length=case.key_length, batch=3)
    query, key, value = make_inputs(case)
    lengths = [case.key_length, max(1, case.key_length * 2 // 3), 0]
    plan = make_plan(case, lowest=1, key_lengths=lengths)
    expected, _ = attend(query, key, value, plan, scale=case.scale, logit_correction="variance")
    for sample, length in enumerate(lengths):
        query[sample, length:] = key[sample, length:] = value[sample, length:] = torch.nan
    found, _ = attend(query, key, value, plan, scale=case.scale, logit_correction="variance")
    for sample, length in enumerate(lengths):
        assert expected[sample, :length].isfinite().all()
        assert torch.equal(found[sample, :length], expected[sample, :length])


def check_value_correction(attend, case: Case) -> None:
    """3d. The same with the covariance of values and keys given back: all blocks read, some left out, padding, and
    whole blocks alone."""
    key_lengths = [max(1, case.key_length - 3 * sample - 5) for sample in range(case.batch)]
    whole = replace(case, key_length=max(1, case.key_length // case.kv_block_size) * case.kv_block_size, order=False)
    variants = ((case, 1, None), (case, 0, None), (case, 1, key_lengths), (whole, 1, None))
    for seed, (variant, lowest, lengths) in enumerate(variants):
        query, key, value = make_inputs(variant, seed)
        value = (value + key.roll(1, -1)).to(case.dtype)  # values that depend on keys, as in a model
        plan = make_plan(variant, seed=seed, lowest=lowest, key_lengths=lengths)
        assert_agrees_with_reference(attend, variant, (query, key, value), plan, value_correction="covariance")


def check_value_gain(attend, case: Case) -> None:
    """3e. The same where each head gets so much of it: none, a part, all, more."""
    query, key, value = make_inputs(case)
    value = (value + key.roll(1, -1)).to(case.dtype)
    gains = torch.tensor([0.5, 0.0, 1.25, 1.0])
    gain = gains[torch.arange(case.batch * case.heads) % 4].view(case.batch, case.heads)
    plan = replace(make_plan(case, lowest=1), value_gain=gain)
    assert_agrees_with_reference(attend, case, (query, key, value), plan, value_correction="covariance")
    none, _ = attend(query, key, value, replace(plan, value_gain=0 * gain), scale=case.scale)
    expected, _ = attend(query, key, value, replace(plan, value_gain=None), scale=case.scale)
    assert torch.equal(none, expected)  # without the correction the gain has no say


def check_empty_rows(attend, case: Case) -> None:
    """5. A block of queries with nothing to read gets output 0 and lse -inf; its neighbours get theirs."""
    inputs, plan = make_inputs(case), make_plan(case, lowest=1)
    plan.level_mask[0, 0, 0] = 0
    plan.level_mask[-1, -1, -1] = 0
    out, lse = attend(*inputs, plan, scale=case.scale, return_lse=True)
    for sample, head, block in ((0, 0, 0), (-1, -1, -1)):
        rows = positions_of_block(plan, block)
        assert (out[sample, rows, head] == 0).all()
        assert (lse[sample, head, rows] == -torch.inf).all()
    assert_agrees_with_reference(attend, case, inputs, plan)


def check_isolation(attend, case: Case) -> None:
    """6. NaN or Inf in keys and values that a block of queries skips does not change its output by a bit."""
    inputs, plan = make_inputs(case), make_plan(case)
    last = plan.kv_blocks - 1
    plan.level_mask[:, :, 0] = 1 if last else 0
    plan.level_mask[:, :, 0, last] = 0
    options = {"scale": case.scale, "value_correction": "covariance", "return_lse": True}
    clean, clean_lse = attend(*inputs, plan, **options)
    order = torch.arange(case.key_length) if plan.order is None else plan.order
    poisoned = order[last * case.kv_block_size :]
    for poison in (torch.nan, torch.inf, -torch.inf):
        query, key, value = (tensor.clone() for tensor in inputs)
        key[:, poisoned] = poison
        value[:, poisoned] = poison
        out, lse = attend(query, key, value, plan, **options)
        for sample, head, block in itertools.product(range(case.batch), range(case.heads), range(plan.query_blocks)):
            if plan.level_mask[sample, head, block, last] == 0:
                rows = positions_of_block(plan, block)
                assert torch.equal(out[sample, rows, head], clean[sample, rows, head]), f"{poison} reached the output"
                assert torch.equal(lse[sample, head, rows], clean_lse[sample, head, rows]), f"{poison} reached the lse"


def check_block_order(attend, case: Case) -> None:
    """7. Moving whole blocks of keys, with their levels, changes nothing; nor does applying the order beforehand."""
    whole = replace(case, key_length=max(1, case.key_length // case.kv_block_size) * case.kv_block_size, order=False)
    query, key, value = make_inputs(whole)
    plan = make_plan(whole)
    moved = torch.randperm(plan.kv_blocks, generator=torch.Generator().manual_seed(5))
    tokens = torch.arange(whole.key_length).view(plan.kv_blocks, -1)[moved].flatten()
    other = replace(plan, level_mask=plan.level_mask[..., moved].contiguous(), cache={})
    assert_agrees_with_reference(attend, whole, (query, key, value), plan)
    expected, _ = attend(query, key, value, plan, scale=case.scale)
    found, _ = attend(query, key[:, tokens].contiguous(), value[:, tokens].contiguous(), other, scale=case.scale)
    tolerance = 16 * torch.finfo(case.dtype).eps * max(1.0, value.abs().max().item())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    if case.order:
        inputs, plan = make_inputs(case), make_plan(case)
        expected, expected_lse = attend(*inputs, plan, scale=case.scale, return_lse=True)
        permuted = [tensor[:, plan.order].contiguous() for tensor in inputs]
        found, lse = attend(*permuted, replace(plan, order=None, cache={}), scale=case.scale, return_lse=True)
        assert torch.equal(found, expected[:, plan.order])
        assert torch.equal(lse, expected_lse[:, :, plan.order])


def check_repeatable(attend, case: Case) -> None:
    """8. Two runs agree to the bit, and so do strided inputs with their contiguous copies."""
    inputs, plan = make_inputs(case), make_plan(case)
    out, lse = attend(*inputs, plan, scale=case.scale, return_lse=True)
    assert out.is_contiguous()
    transposed = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in inputs]
    spaced = [torch.full((*tensor.shape, 2), torch.nan, dtype=tensor.dtype) for tensor in inputs]
    for wide, tensor in zip(spaced, inputs, strict=True):
        wide[..., 1] = tensor
    for variant in (inputs, transposed, [wide[..., 1] for wide in spaced]):
        again, again_lse = attend(*variant, replace(plan, cache={}), scale=case.scale, return_lse=True)
        assert torch.equal(again, out)
        assert torch.equal(again_lse, lse)


def check_padding(attend, case: Case) -> None:
    """Padded keys are not read, even if they are NaN; a sample of nothing but padding gives 0."""
    query, key, value = make_inputs(replace(case, batch=3))
    lengths = [case.key_length, max(1, case.key_length * 2 // 3), 0]
    plan = make_plan(replace(case, batch=3), lowest=1, key_lengths=lengths)
    for sample, length in enumerate(lengths):
        key[sample, length:] = torch.nan
        value[sample, length:] = torch.inf
    out, lse = attend(query, key, value, plan, scale=case.scale, return_lse=True)
    assert (out[2] == 0).all()
    assert (lse[2] == -torch.inf).all()
    assert out.isfinite().all()
    assert_agrees_with_reference(attend, case, (query, key, value), plan)
    if plan.order is None:  # the padding can be cut off
        length = lengths[1]
        levels = plan.level_mask[1:2, :, :, : -(-length // case.kv_block_size)]
        short = replace(plan, level_mask=levels.contiguous(), key_length=length, key_lengths=None, cache={})
        cut = query[1:2], key[1:2, :length].contiguous(), value[1:2, :length].contiguous()
        found, _ = attend(*cut, short, scale=case.scale)
        tolerance = 16 * torch.finfo(case.dtype).eps * max(1.0, cut[2].abs().max().item())
        torch.testing.assert_close(found, out[1:2], rtol=0, atol=tolerance)


def positions_of_block(plan: Plan, block: int) -> Tensor:
    """The query tokens of a block."""
    order = torch.arange(plan.query_length) if plan.order is None else plan.order
    return order.split(plan.query_block_size)[block]


CHECKS = (
    check_level_one_is_dense,
    check_pooled_levels,
    check_random_plans,
    check_variance_correction,
    check_variance_of_padded_queries,
    check_value_correction,
    check_value_gain,
    check_empty_rows,
    check_isolation,
    check_block_order,
    check_repeatable,
    check_padding,
)

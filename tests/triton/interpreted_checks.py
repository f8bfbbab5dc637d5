"""What a test wants to know from inside the interpreter's process."""

from unittest import mock

import torch

from psa_diffusers.backends.triton import attend_triton, launch, logit_variance
from psa_diffusers.backends.triton.covariance import build_covariance
from psa_diffusers.backends.triton.layout import PyramidLayout
from psa_diffusers.backends.triton.pyramid import build_pyramid, empty_pyramid
from tests.backends import conformance


def lists_of_two_calls(case: conformance.Case) -> list[int]:
    """Entries in the plan's cache after one call, and after a second in another dtype."""
    plan = conformance.make_plan(case)
    entries = []
    for dtype in (torch.float32, torch.float16):
        attend_triton(*(tensor.to(dtype) for tensor in conformance.make_inputs(case)), plan, scale=1.0)
        entries.append(len(plan.cache))
    return entries


def attention_in_groups(case: conformance.Case, lengths: list[int] | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Outputs and lse of the same call, all heads at once and in groups of two and one."""
    inputs, plan = conformance.make_inputs(case), conformance.make_plan(case, lowest=1, key_lengths=lengths)
    results = []
    for blocks in (launch.GROUP_BLOCKS, 2):
        with mock.patch.object(launch, "GROUP_BLOCKS", blocks):
            results.append(attend_triton(*inputs, plan, scale=1.0, value_correction="covariance", return_lse=True))
    return results


def covariance(key: torch.Tensor, value: torch.Tensor, kv_block_size: int, num_levels: int, counted: torch.Tensor):
    """Matrix and factors of the value correction, from a pyramid of these keys and values."""
    layout = PyramidLayout(-(-key.shape[1] // kv_block_size), kv_block_size, num_levels)
    return tuple(build_covariance(build_pyramid(key, value, layout), layout, counted))


def logit_correction(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_lengths: torch.Tensor,
    kv_block_size: int,
    num_levels: int,
    in_pyramid: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The bias with the logit correction, that of the centroids, and the pyramid's own; their buffers hold NaN before.

    ``in_pyramid``: by the pyramid kernel, otherwise by the kernel for blocks that one program does not hold.
    """
    layout = PyramidLayout(-(-key.shape[1] // kv_block_size), kv_block_size, num_levels)
    pyramid = empty_pyramid(key, layout, with_centroid_bias=True)
    inputs = (query, key, value, pyramid, layout, None, key_lengths)
    with mock.patch.object(logit_variance, "pools_whole_blocks", return_value=in_pyramid):
        head_bias, launches = logit_variance.pyramid_launches(*inputs, scale=0.3)
    assert len(launches) == 2 if in_pyramid else 3
    for bias in (head_bias, pyramid.centroid_bias, pyramid.bias):
        bias.fill_(torch.nan)
    for each in launches:
        each.run()
    return head_bias, pyramid.centroid_bias, pyramid.bias


def compiled_attention(case: conformance.Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of the plain call, and of the same call traced into one graph (fullgraph: a break is an error)."""
    inputs = conformance.make_inputs(case)

    def attend(query, key, value, plan):
        return attend_triton(query, key, value, plan, scale=1.0, return_lse=True)

    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    return attend(*inputs, conformance.make_plan(case)), compiled(*inputs, conformance.make_plan(case))

"""Every documented error of build_plan, and what it says."""

import pytest
import torch

from psa_diffusers import PSAConfig
from psa_diffusers.planning import build_plan
from psa_diffusers.planning.validation import check_full_tokens, check_key_lengths, check_scale


def qkv(length=32, key_length=None, **options):
    key_length = length if key_length is None else key_length
    return [torch.zeros(2, size, 3, 8, **options) for size in (length, key_length, key_length)]


def changed(index, tensor):
    tensors = qkv()
    tensors[index] = tensor
    return tensors


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        (changed(0, [1.0]), TypeError, "query must be a torch.Tensor, but is list"),
        (changed(1, torch.zeros(2, 32, 3, 8, dtype=torch.int32)), TypeError, "key must be float16, .* but is int32"),
        (changed(0, torch.zeros(32, 3, 8)), ValueError, r"query must have 4 dimensions, .* \(32, 3, 8\)"),
        (changed(0, torch.zeros(2, 0, 3, 8)), ValueError, "query must not be empty"),
        (changed(2, torch.zeros(2, 31, 3, 8)), ValueError, "key and value must have one shape"),
        (changed(0, torch.zeros(1, 32, 3, 8)), ValueError, "agree in batch"),
        (changed(0, torch.zeros(2, 32, 4, 8)), ValueError, "agree in heads"),
        (changed(0, torch.zeros(2, 32, 3, 4)), ValueError, "agree in head_dim"),
        (changed(0, torch.zeros(2, 32, 3, 8).half()), ValueError, "one dtype, but have float16, float32, float32"),
        (changed(1, torch.zeros(2, 32, 3, 8, device="meta")), ValueError, "one device, but are on cpu, meta, cpu"),
    ],
)
def test_tensors(tensors, error, message):
    with pytest.raises(error, match=message):
        build_plan(*tensors, PSAConfig())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(grid=5), TypeError, "grid must be"),
        (dict(grid=(4, 8)), ValueError, "three whole numbers"),
        (dict(grid=(4, 8, 1.0)), ValueError, "three whole numbers"),
        (dict(grid=(0, 8, 4)), ValueError, "from 1"),
        (dict(grid=(2, 4, 5)), ValueError, "2 x 4 x 5 = 40 tokens and 0 full tokens make 40, but the sequence has 32"),
        (dict(grid=(2, 4, 4), full_tokens=slice(0, 3)), ValueError, "make 35, but the sequence has 32"),
        (dict(full_tokens=slice(0, 33)), ValueError, "within the sequence of 32 tokens"),
        (dict(full_tokens=slice(-33, None)), ValueError, "within the sequence of 32 tokens"),
        (dict(full_tokens=slice(0, 8, 2)), ValueError, "step 1"),
        (dict(full_tokens=slice(0.0, 8)), TypeError, "slice of whole numbers"),
        (dict(full_tokens=[1, 2]), TypeError, "slice or a bool mask, but is list"),
        (dict(full_tokens=torch.zeros(31, dtype=torch.bool)), ValueError, r"bool \[32\]"),
        (dict(full_tokens=torch.zeros(32, dtype=torch.int64)), ValueError, r"bool \[32\]"),
        (dict(key_lengths=5), TypeError, "key_lengths must be an int tensor"),
        (dict(key_lengths=[1.0, 2.0]), TypeError, "whole numbers"),
        (dict(key_lengths=torch.tensor([1.0, 2.0])), TypeError, "whole numbers, but is float32"),
        (dict(key_lengths=torch.tensor([1, 2, 3])), ValueError, r"shape \[2\], but has \[3\]"),
        (dict(key_lengths=torch.tensor([1, 33])), ValueError, "within 0 to 32, .* but holds 33"),
        (dict(key_lengths=[-1, 3]), ValueError, "within 0 to 32, .* but holds -1"),
        (dict(scale="big"), TypeError, "scale must be a number"),
        (dict(scale=float("nan")), ValueError, "scale must be finite"),
    ],
)
def test_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        build_plan(*qkv(), PSAConfig(), **arguments)


def test_config():
    with pytest.raises(TypeError, match="config must be a PSAConfig or None, but is dict"):
        build_plan(*qkv(), {"compute_budget": 0.2})
    assert build_plan(*qkv()).num_levels == PSAConfig().num_levels


def test_what_is_accepted():
    assert check_full_tokens(slice(-4, None), 32) == (28, 32)
    assert check_full_tokens(slice(4, 4), 32) is None
    assert check_full_tokens(torch.zeros(32, dtype=torch.bool), 32) is None
    assert check_key_lengths(None, 2, 8, torch.device("cpu")) is None
    lengths = check_key_lengths(torch.tensor([0, 8], dtype=torch.int32), 2, 8, torch.device("cpu"))
    assert lengths.dtype == torch.int64
    assert lengths.tolist() == [0, 8]
    assert check_scale(None, 64) == 0.125
    assert check_scale(2, 64) == 2.0

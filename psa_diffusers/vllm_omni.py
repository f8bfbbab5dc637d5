"""The door to vLLM-Omni: the callable that its sparse-attention dispatcher (``SPARSE_ATTN``) finds by its entry point.

``pyproject.toml`` declares it as ``psa`` in the group ``vllm_omni.sparse_attn``. vLLM-Omni itself is not imported.
Settings of :class:`~psa_diffusers.PSAConfig`, or ``preset``, are given beside the backend's name; see
``docs/other_doors.md``.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import pyramid_sparse_attention
from .config import PSAConfig
from .integration.processor import OTHER_TOKENS
from .integration.schedule import Step, dense_reason
from .integration.tokens import NO_GRID

logger = logging.getLogger(__name__)

STEP_INDEX, STEP_TOTAL, LATENTS, PATCH = "denoise_step_idx", "total_denoise_steps", "latent_shape", "patch_size"
SETTINGS = tuple(field.name for field in dataclasses.fields(PSAConfig))
# A call says neither which layer it is of nor which expert. Settings that this version lacks are at their default.
NOT_FOLLOWED = {"dense_layers": (), "refresh_every": 1, "budget_schedule": None}
SPARSE = "sparse"

#: Calls of this process that ran sparse, and dense by reason.
counts: Counter[str] = Counter()
_configs: dict[str, PSAConfig] = {}


@torch.compiler.disable(recursive=True)
def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: Mapping[str, Any],
    is_causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:
    """Self-attention as vLLM-Omni asks for it. A call that cannot be sparse runs dense, with a warning once a reason.

    It is sparse where the tokens are the video's grid and nothing else, outside the dense share of the steps. Reading
    step and grid, which arrive as tensors, waits for the device.

    Args:
        query: [batch, seq, heads, head_dim].
        key, value: The same shape; other lengths and grouped heads run dense.
        params: Settings of :class:`~psa_diffusers.PSAConfig` or ``preset``; and what the framework adds: the step
            (``denoise_step_idx``, ``total_denoise_steps``, [batch]), the latents' size before they are cut into patches
            (``latent_shape``) and the patches' (``patch_size``), each (frames, height, width), [batch, 3].
        is_causal: Causal attention runs dense.
        softmax_scale: Factor of the logits; default ``head_dim ** -0.5``.

    Returns:
        [batch, seq, heads, head_dim], in the query's dtype.

    Raises:
        ValueError: a setting is unknown, breaks its rule, or cannot be followed here.
    """
    config, state = config_of(params), _read(params)
    grid = _grid(state)
    reason = _why_dense(query, key, config, state, grid, is_causal)
    counts[reason or SPARSE] += 1
    if reason is None:
        return pyramid_sparse_attention(query, key, value, config, grid=grid, scale=softmax_scale)
    if not reason.startswith("dense ") and counts[reason] == 1:
        logger.warning("PSA: attention stays dense: %s.", reason)
    return _dense(query, key, value, is_causal, softmax_scale)


# The dispatcher then refuses masks itself rather than have them ignored.
sparse_attention.capabilities = {"supports_attention_mask": False}


def config_of(params: Mapping[str, Any]) -> PSAConfig:
    """The settings among what arrives; default ``PSAConfig()``.

    Raises:
        ValueError: one breaks its rule, cannot be followed, or is nearly, but not quite, the name of a setting.
    """
    given = {name: value for name, value in params.items() if name in SETTINGS or name == "preset"}
    _check_names(params)
    text = json.dumps(given, sort_keys=True, default=str)
    if text not in _configs:
        _configs[text] = _make_config(given)
    return _configs[text]


def _check_names(params: Mapping[str, Any]) -> None:
    """Whatever else the framework hands over is not ours; a misspelt setting should not pass for that."""
    for name in params:
        near = difflib.get_close_matches(name, [*SETTINGS, "preset"], 1, cutoff=0.85)
        if near and near[0] != name:
            raise ValueError(f"PSA: unknown setting {name!r}; {near[0]!r}?")


def _make_config(given: dict[str, Any]) -> PSAConfig:
    preset = given.pop("preset", None)
    base = PSAConfig.preset(preset).to_dict() if preset is not None else {}
    config = PSAConfig.from_dict({**base, **given})
    for name, only in NOT_FOLLOWED.items():
        if getattr(config, name, only) != only:
            raise ValueError(f"PSA: {name} must be left out here: vLLM-Omni does not say which layer a call is of.")
    return config


def _read(params: Mapping[str, Any]) -> dict[str, list[list[int]]]:
    """Step and sizes, a list a sample; whatever is on a device in one go."""
    found = {name: params[name] for name in (STEP_INDEX, STEP_TOTAL, LATENTS, PATCH) if params.get(name) is not None}
    if not found:
        return {}
    tensors = [torch.as_tensor(value).long() for value in found.values()]
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), tensors[0].device)
    numbers = torch.cat([tensor.to(device).flatten() for tensor in tensors]).tolist()
    state, start = {}, 0
    for name, tensor in zip(found, tensors, strict=True):
        width = 1 if name in (STEP_INDEX, STEP_TOTAL) else 3
        own = numbers[start : start + tensor.numel()]
        state[name] = [own[place : place + width] for place in range(0, len(own), width)]
        start += tensor.numel()
    return state


def _grid(state: Mapping[str, list[list[int]]]) -> tuple[int, int, int] | None:
    """(frames, height, width) in tokens."""
    if LATENTS not in state or PATCH not in state or not all(state[PATCH][0]):
        return None
    frames, height, width = (size // cut for size, cut in zip(state[LATENTS][0], state[PATCH][0], strict=True))
    return frames, height, width


def _why_dense(
    query: Tensor,
    key: Tensor,
    config: PSAConfig,
    state: Mapping[str, list[list[int]]],
    grid: tuple[int, int, int] | None,
    is_causal: bool,
) -> str | None:
    mixed = any(sample != samples[0] for samples in state.values() for sample in samples)
    whole = grid is not None and math.prod(grid) == query.shape[1] == key.shape[1]
    reasons = {
        "causal attention": is_causal,
        "grouped queries": query.shape[2] != key.shape[2],
        "samples in other steps, or of other sizes": mixed,
        NO_GRID: grid is None,
        OTHER_TOKENS: not whole,
        "one block of keys": key.shape[1] <= config.kv_block_size,
    }
    found = next((reason for reason, holds in reasons.items() if holds), None)
    return found or _why_dense_step(config, state)


def _why_dense_step(config: PSAConfig, state: Mapping[str, list[list[int]]]) -> str | None:
    if not config.dense_warmup and not config.dense_last:
        return None  # whichever step it is
    known = STEP_INDEX in state and STEP_TOTAL in state
    return dense_reason(Step(state[STEP_INDEX][0][0], state[STEP_TOTAL][0][0]) if known else None, config)


def _dense(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    tensors = (tensor.transpose(1, 2) for tensor in (query, key, value))
    options = {"is_causal": is_causal, "scale": scale, "enable_gqa": query.shape[2] != key.shape[2]}
    return F.scaled_dot_product_attention(*tensors, **options).transpose(1, 2)

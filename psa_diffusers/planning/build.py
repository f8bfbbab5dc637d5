"""build_plan: from queries, keys and values to the levels at which each block pair is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autocasting import without_autocast
from ..backends.logit_variance import query_lengths, query_power
from ..config import PSAConfig
from .blocks import Layout, make_layout, real_positions, unpadded_positions
from .budget import Limits, spend, step_prices
from .dispatch import choose_planner
from .errors import pair_errors
from .importance import (
    Importance,
    antidiagonal_importance,
    block_means,
    centroid_energy,
    pooled_importance,
    sampled_importance,
)
from .levels import cap_levels, threshold_levels, topk_levels
from .plan import Plan
from .sampling import Samples, draw_samples
from .sharing import mean_over_heads
from .similarity import similarity_cap
from .spread import Spread, measure_spread
from .target import ROUNDS, ROWS, corrected_target
from .validation import (
    check_full_tokens,
    check_grid,
    check_grid_fits,
    check_key_lengths,
    check_scale,
    check_tensors,
)
from .value_gain import measure_row_errors, measure_value_gain


@torch.no_grad()
def build_plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: PSAConfig | None = None,
    *,
    grid: tuple[int, int, int] | None = None,
    full_tokens: slice | Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    heads_group: Any | None = None,
) -> Plan:
    """Choose the level at which every block of queries reads every block of keys (paper section 3).

    Args:
        query: [batch, query_seq, heads, head_dim], float16, bfloat16, float32 or float64, any strides and device.
        key, value: [batch, key_seq, heads, head_dim], of the same dtype and device.
        config: The rule and its settings; None = the defaults.
        grid: ``(frames, height, width)`` of the video tokens. With it, and with as many queries as keys, tokens are
            taken in the config's order, full tokens last; without it in their own order.
        full_tokens: Slice or bool mask [key_seq] of the tokens outside the grid (text, conditioning). A block that
            holds one is level 1 for every query block, and for its own queries if they are the same sequence.
        key_lengths: int [batch]; keys from that raster position on are padding. They count for nothing here, not even
            if they are NaN; a block of nothing else is level 0.
        scale: Factor on the logits; None = 1 / sqrt(head_dim).
        heads_group: The ``torch.distributed`` group of the processes that each hold some of the layer's heads, lower
            ranks the earlier ones, over the full sequence. All of them call this at the same time, and their plans
            together are the plan of one process with all heads. None = all heads are here.

    Returns:
        The plan. The same inputs and ``config.seed`` give the same plan to the bit; a sample's plan does not depend on
        the others in the batch; the global random state is neither read nor moved. On a GPU nothing waits for it,
        unless ``full_tokens`` is a mask on that GPU.

    Raises:
        TypeError, ValueError: an argument breaks its rule; the message names it, the rule and the value.
    """
    config = PSAConfig() if config is None else config
    if not isinstance(config, PSAConfig):
        raise TypeError(f"config must be a PSAConfig or None, but is {type(config).__name__}.")
    check_tensors(query, key, value)
    batch, query_length, key_length, device = query.shape[0], query.shape[1], key.shape[1], query.device
    grid = check_grid(grid)
    full = check_full_tokens(full_tokens, key_length)
    check_grid_fits(grid, full, key_length)
    lengths = check_key_lengths(key_lengths, batch, key_length, device)
    scale = check_scale(scale, query.shape[3])
    layout = make_layout(
        query_length,
        key_length,
        config.query_block_size,
        config.kv_block_size,
        curve=config.order,
        grid=grid,
        full_tokens=full,
        device=device,
    )
    planner, reason = choose_planner(query, key_length, config, heads_group)
    with without_autocast(device):
        levels = _PLANNERS[planner](query, key, value, config, layout, lengths, scale, heads_group)
        value_gain = _value_gain(query, key, value, levels, config, layout, lengths, scale)
    return Plan(
        level_mask=levels,
        query_length=query_length,
        key_length=key_length,
        query_block_size=config.query_block_size,
        kv_block_size=config.kv_block_size,
        num_levels=config.num_levels,
        order=layout.order,
        key_lengths=lengths,
        value_gain=value_gain,
        notes=_notes(config, layout, levels.shape),
        planner=planner,
        planner_reason=reason,
    )


def _value_gain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    config: PSAConfig,
    layout: Layout,
    lengths: Tensor | None,
    scale: float,
) -> Tensor | None:
    """float32 [batch, heads] where the config asks for a measured value correction."""
    if config.value_correction != "fitted":
        return None
    size, real = config.kv_block_size, None
    if lengths is not None:
        real = real_positions(key.shape[1], size, layout.order, lengths, key.device)
    return measure_value_gain(
        *(query, key, value, levels, layout.order, real),
        query_block_size=config.query_block_size,
        kv_block_size=size,
        num_levels=config.num_levels,
        scale=scale,
        seed=config.seed,
    )


def _notes(config: PSAConfig, layout: Layout, shape: torch.Size) -> tuple[str, ...]:
    """What to report; from sizes alone, so that a GPU is not waited for (padding is not looked at)."""
    if config.compute_budget is None or layout.full_pairs == 0:
        return ()
    pairs = shape[2] * shape[3]
    least = (layout.full_pairs + (pairs - layout.full_pairs) / config.kv_block_size) / pairs
    if least <= config.compute_budget:
        return ()
    return (
        f"full tokens take {layout.full_pairs} of {pairs} block pairs a head, so that the cheapest plan costs "
        f"{least:.4f}, above compute_budget={config.compute_budget:g}; the rest is read at one centroid a block.",
    )


def _torch_levels(*arguments: Any) -> Tensor:
    """int8 [batch, heads, query_blocks, kv_blocks] by torch operators; arguments as for :class:`_Planner`."""
    return _Planner(*arguments).levels()


def _triton_levels(*arguments: Any) -> Tensor:
    """The same by fused GPU kernels, which have all heads here."""
    from .triton import plan_levels

    return plan_levels(*arguments[:-1])


_PLANNERS = {"torch": _torch_levels, "triton": _triton_levels}


class _Planner:
    """The steps from tensors to levels, with what they share."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        config: PSAConfig,
        layout: Layout,
        lengths: Tensor | None,
        scale: float,
        heads_group: Any | None,
    ) -> None:
        self.query, self.key, self.value = query, key, value
        self.config, self.layout, self.scale = config, layout, scale
        self.lengths, self.heads_group = lengths, heads_group
        self.real = None
        self.counted = None
        if lengths is not None:
            self.real = real_positions(key.shape[1], config.kv_block_size, layout.order, lengths, key.device)
            self.counted = self.real.any(2)

    def levels(self) -> Tensor:
        """int8 [batch, heads, query_blocks, kv_blocks] by the config's rule."""
        config = self.config
        cap = None
        if config.similarity_thresholds is not None:
            cap = similarity_cap(
                self.key, self.layout.order, self.real, config.kv_block_size, config.similarity_thresholds
            )
        if config.rule == "budget":
            return self._budget_levels(cap)
        score = self._importance(self._query_samples()).score
        if config.rule == "threshold":
            levels = threshold_levels(score, config.level_thresholds, self.counted)
        else:
            levels = topk_levels(score, config.level_fractions, self.counted)
        levels = levels if cap is None else cap_levels(levels, cap)
        full = self._full_pairs()
        if full is not None:
            levels = torch.where(full, 1, levels).to(torch.int8)
            levels = levels if self.counted is None else levels * self.counted[:, None, None, :]
        return levels

    def _budget_levels(self, cap: Tensor | None) -> Tensor:
        config = self.config
        samples = self._query_samples(turn=1)
        spread = measure_spread(
            self.key, self.value, self.layout.order, self.real, config.kv_block_size, config.num_levels
        )
        importance = self._importance(self._query_samples(), spread)
        second = centroid_energy(
            samples,
            spread.key_mean,
            spread.key[-1],
            self._key_counts(),
            config.kv_block_size,
            scale=self.scale,
        )
        # A few heads at a time: errors and prices in float32 would be many times the level mask.
        pairs, prices = importance.score[:, 0].numel(), []
        step = max(1, (2**17 if importance.score.device.type == "cpu" else 2**22) // pairs)
        for start in range(0, importance.score.shape[1], step):
            heads = slice(start, start + step)
            errors = pair_errors(
                importance.of_heads(heads),
                second[:, heads],
                samples.of_heads(heads),
                spread.of_heads(heads),
                self.layout.full_query_blocks,
                scale=self.scale,
            )
            prices.append(step_prices(errors, config.kv_block_size, None if cap is None else cap[:, heads]))
        prices = torch.cat(prices, dim=2)
        limits = Limits(cap, self.counted, self._full_pairs())
        where = (config.kv_block_size, limits, self.heads_group)
        levels = spend(prices, config.compute_budget, *where, target_error=config.target_error)
        return levels if config.target_error is None else self._to_target(prices, levels, where)

    def _to_target(self, prices: Tensor, levels: Tensor, where: tuple) -> Tensor:
        """Levels that come nearer to the target error than these, by what they err on some rows."""
        config, wanted, power = self.config, self.config.target_error, None
        if config.logit_correction == "variance":
            power = query_power(self.query, torch.float32, query_lengths(self.query, self.key, self.lengths))
        for _ in range(ROUNDS):
            errors = measure_row_errors(
                *(self.query, self.key, self.value, levels, self.layout.order, self.real),
                power=power,
                value_correction=config.value_correction,
                query_block_size=config.query_block_size,
                kv_block_size=config.kv_block_size,
                num_levels=config.num_levels,
                scale=self.scale,
                seed=config.seed,
                count=ROWS,
            )
            mean = errors.mean(1)
            if self.heads_group is not None:
                mean = mean_over_heads(mean, errors.shape[1], self.heads_group)
            wanted = corrected_target(config.target_error, wanted, mean)
            levels = spend(prices, None, *where, target_error=wanted)
        return levels

    def _query_samples(self, turn: int = 0) -> Samples:
        config = self.config
        return draw_samples(
            self.query,
            self.layout.order,
            None,
            config.query_block_size,
            config.sampled_queries,
            seed=config.seed,
            kind="query",
            turn=turn,
        )

    def _importance(self, samples: Samples, spread: Spread | None = None) -> Importance:
        config, order = self.config, self.layout.order
        sizes = {"query_block_size": config.query_block_size, "kv_block_size": config.kv_block_size}
        if config.importance == "antidiagonal":
            return antidiagonal_importance(
                self.query,
                self.key,
                order=order,
                real=self.real,
                scale=self.scale,
                reduction=config.importance_reduction,
                **sizes,
            )
        if config.importance == "pooled":
            real = self.real
            if real is None:
                real = unpadded_positions(self.key.shape[1], config.kv_block_size, self.key.device)
            key_mean = block_means(self.key, order, real) if spread is None else spread.key_mean
            query_real = unpadded_positions(self.query.shape[1], config.query_block_size, self.query.device)
            return pooled_importance(
                block_means(self.query, order, query_real), key_mean, real.sum(2), scale=self.scale
            )
        keys = draw_samples(
            self.key, order, self.real, config.kv_block_size, config.sampled_keys, seed=config.seed, kind="key"
        )
        return sampled_importance(samples, keys, scale=self.scale, reduction=config.importance_reduction)

    def _key_counts(self) -> Tensor | None:
        """int64 [batch or 1, kv_blocks]: real keys of each block; None when all blocks are full."""
        if self.real is not None:
            return self.real.sum(2)
        length, size = self.key.shape[1], self.config.kv_block_size
        return unpadded_positions(length, size, self.key.device).sum(2) if length % size else None

    def _full_pairs(self) -> Tensor | None:
        """bool [query_blocks, kv_blocks]: pairs whose row or column holds a full token."""
        layout = self.layout
        if layout.full_kv_blocks is None:
            return None
        rows = -(-self.query.shape[1] // self.config.query_block_size)
        full = layout.full_kv_blocks[None, :].expand(rows, -1)
        return full if layout.full_query_blocks is None else full | layout.full_query_blocks[:, None]

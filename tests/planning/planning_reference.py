"""A plan's attention by its definition, dense and masked: slow, and independent of the backends."""

import torch


def masked_attention(query, key, value, plan, scale=None):
    """[batch, seq, heads, head_dim] in and out; every pooled group is written out as its real tokens' mean."""
    batch, query_length, heads, head_dim = query.shape
    key_length = key.shape[1]
    order = torch.arange(key_length) if plan.order is None else plan.order
    query_order = torch.arange(query_length) if plan.order is None else plan.order
    scale = head_dim**-0.5 if scale is None else scale
    queries, keys, values = (tensor.double().transpose(1, 2) for tensor in (query, key, value))
    queries, keys, values = queries[:, :, query_order], keys[:, :, order], values[:, :, order]
    real = plan.real_keys()
    real = torch.ones(batch, key_length, dtype=torch.bool) if real is None else real
    keys = keys.masked_fill(~real[:, None, :, None], 0.0)
    values = values.masked_fill(~real[:, None, :, None], 0.0)
    place = torch.arange(key_length)
    levels = plan.level_mask.long().repeat_interleave(plan.query_block_size, 2)[:, :, :query_length]
    levels = levels.repeat_interleave(plan.kv_block_size, 3)[..., :key_length]
    sizes = [2 ** (level - 1) for level in range(1, plan.num_levels + 1)] + [plan.kv_block_size]
    weights = torch.zeros(batch, heads, query_length, key_length, dtype=torch.float64)
    for level, size in enumerate(sizes, start=1):
        group = place // plan.kv_block_size * plan.kv_block_size + place % plan.kv_block_size // size * size
        same = (group[:, None] == group[None, :]).double() * real[:, None, :]
        mean = same / same.sum(-1, keepdim=True).clamp(min=1)
        pooled = torch.einsum("bij,bhjd->bhid", mean, keys)
        logits = queries @ pooled.transpose(2, 3) * scale
        weights = torch.where(levels == level, logits.exp(), weights)
    weights = weights * real[:, None, None, :]
    # Within a group the weights are alike, so that the values themselves give the mean value.
    out = weights @ values / weights.sum(-1, keepdim=True)
    result = torch.empty_like(out)
    result[:, :, query_order] = out
    return result.transpose(1, 2)


def dense_attention(query, key, value, scale=None):
    """float64 [batch, seq, heads, head_dim]."""
    queries, keys, values = (tensor.double().transpose(1, 2) for tensor in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(queries, keys, values, scale=scale).transpose(1, 2)


def relative_error(out, truth):
    return float((out - truth).norm() / truth.norm())

"""The demo model's transformer and text encoder: configuration, initialisation, and faster equivalents for training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import nn
from transformers import PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

FULL_GRID = (17, 16, 16)
LONG = 640  # keys above which fused attention is used in training
TEXT_LENGTH = 512  # WanPipeline pads prompt embeddings with zeros to this length
TRANSFORMER_CONFIG = {
    "patch_size": (1, 1, 1),
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 64,
    "freq_dim": 256,
    "ffn_dim": 768,
    "num_layers": 5,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
}


def build_transformer() -> WanTransformer3DModel:
    """A new transformer: output zero, open gates, and text padding that does not drown the words."""
    model = WanTransformer3DModel(**TRANSFORMER_CONFIG)
    with torch.no_grad():
        nn.init.zeros_(model.proj_out.weight)
        nn.init.zeros_(model.proj_out.bias)
        text = model.condition_embedder.text_embedder
        for layer in (text.linear_1, text.linear_2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for block in model.blocks:
            block.scale_shift_table[:, [2, 5]] = 0.4
            _quiet_padding(block.attn2)
    return model


def _quiet_padding(attention: nn.Module) -> None:
    """Start with a low attention logit for the (zero) padding tokens, of which there are some five hundred."""
    direction = torch.randn(attention.to_k.bias.shape)
    attention.to_k.bias.copy_(0.1 * direction)
    attention.to_q.bias.copy_(-direction)
    nn.init.zeros_(attention.to_v.bias)


def build_text_encoder(vocabulary_size: int) -> UMT5EncoderModel:
    """A new two-layer UMT5 encoder with 64 channels."""
    config = UMT5Config(
        vocab_size=vocabulary_size,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
    )
    return UMT5EncoderModel(config)


def encode_text(
    encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt embeddings [batch, length + 1, channels], zero after each prompt's end, and the attention bias.

    The last row stands for all the remaining padding of the 512 tokens that WanPipeline passes: identical keys and
    values act as one with ln(count) added to its logit. The bias is [batch, 1, 1, length + 1].
    """
    device = next(encoder.parameters()).device
    tokens = tokenizer(prompts, padding=True, return_tensors="pt").to(device)
    mask = tokens.attention_mask
    hidden = encoder(tokens.input_ids, mask).last_hidden_state * mask[..., None]
    lengths = mask.sum(1)
    bias = torch.zeros(len(prompts), mask.shape[1] + 1, device=device)
    bias[:, :-1].masked_fill_(mask == 0, -torch.inf)
    bias[:, -1] = torch.log(TEXT_LENGTH - lengths.float())
    return F.pad(hidden, (0, 0, 0, 1)), bias[:, None, None]


class ScaledRope(nn.Module):
    """Wan's rotary embedding with the positions of a small grid spread over the range of the full one.

    At the full grid it equals the stock module, so it can be taken away after training.
    """

    def __init__(self, head_dim: int = 64, full: tuple[int, int, int] = FULL_GRID, theta: float = 10000.0) -> None:
        super().__init__()
        side = 2 * (head_dim // 6)
        self.dims = (head_dim - 2 * side, side, side)
        self.full = full
        self.theta = theta
        self.cache: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [1, tokens, 1, head_dim], each value twice, for latents [batch, channels, t, h, w]."""
        grid = tuple(hidden_states.shape[2:])
        if grid not in self.cache:
            angles = self.angles(grid).to(hidden_states.device)
            self.cache[grid] = (angles.cos().float(), angles.sin().float())
        return self.cache[grid]

    def angles(self, grid: tuple[int, ...]) -> torch.Tensor:
        """Rotation angles [1, tokens, 1, head_dim] in float64."""
        strides = ((self.full[0] - 1) / max(grid[0] - 1, 1), self.full[1] / grid[1], self.full[2] / grid[2])
        parts = []
        for axis, (count, stride, dim) in enumerate(zip(grid, strides, self.dims, strict=True)):
            frequencies = self.theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            angle = (torch.arange(count, dtype=torch.float64) * stride)[:, None] * frequencies
            shape = [1, 1, 1, dim]
            shape[axis] = count
            parts.append(angle.repeat_interleave(2, dim=1).view(shape).expand(*grid, dim))
        return torch.cat(parts, dim=-1).reshape(1, -1, 1, sum(self.dims))


class TrainingAttention:
    """WanAttnProcessor's computation for training: rotation in one pass, text padding as one token with a bias."""

    def __init__(self) -> None:
        self.text_bias: torch.Tensor | None = None
        self._attention_backend = None
        self._parallel_config = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = rms_norm(attn.to_q(hidden_states), attn.norm_q).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        key = rms_norm(attn.to_k(source), attn.norm_k).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        value = attn.to_v(source).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        bias = None
        if rotary_emb is not None:
            query, key = rotate(query, *rotary_emb), rotate(key, *rotary_emb)
        elif self.text_bias is not None:
            bias = self.text_bias.to(query.dtype)
        if key.shape[2] > LONG:
            out = F.scaled_dot_product_attention(query, key, value)
        else:  # on CPUs plain products are two to four times faster for few keys
            logits = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
            out = (logits if bias is None else logits + bias).softmax(-1).to(value.dtype) @ value
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def rms_norm(x: torch.Tensor, norm: nn.RMSNorm) -> torch.Tensor:
    """RMS norm that stays in the input's type."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square() / x.shape[-1]
    scale = torch.rsqrt(square + norm.eps)
    return x * scale.to(x.dtype) * norm.weight.to(x.dtype)


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of channels of [batch, heads, tokens, head_dim]."""
    cosine, sine = (table.transpose(1, 2).to(x.dtype) for table in (cosine, sine))
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-second, first), dim=-1).flatten(-2)
    return x * cosine + turned * sine


def prepare_for_training(model: WanTransformer3DModel) -> TrainingAttention:
    """Install the scaled rotary embedding and the training attention; returns the latter, whose bias is set a batch."""
    processor = TrainingAttention()
    model.rope = ScaledRope()
    for block in model.blocks:
        block.attn1.set_processor(processor)
        block.attn2.set_processor(processor)
    return processor

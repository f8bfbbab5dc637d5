import pytest
import torch

from psa_diffusers.synthetic import rotate, video_like_qkv


def test_shapes_dtype_and_seed():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    tensors = video_like_qkv(2, (2, 6, 5), 3, 16, seed=4, dtype=torch.float16)
    assert torch.equal(torch.get_rng_state(), before)
    assert [tuple(tensor.shape) for tensor in tensors] == [(2, 60, 3, 16)] * 3
    assert all(tensor.dtype == torch.float16 for tensor in tensors)
    again = video_like_qkv(2, (2, 6, 5), 3, 16, seed=4, dtype=torch.float16)
    assert all(torch.equal(*pair) for pair in zip(tensors, again, strict=True))
    other = video_like_qkv(2, (2, 6, 5), 3, 16, seed=5, dtype=torch.float16)
    assert not torch.equal(tensors[0], other[0])


def test_neighbours_are_alike_and_noise_undoes_it():
    def likeness(**options):
        key = video_like_qkv(1, (4, 16, 16), 1, 32, **options)[1].view(4, 16, 16, 32)
        return float(torch.cosine_similarity(key[:, :, 1:], key[:, :, :-1], dim=-1).mean())

    assert likeness(noise=0.0, correlation=4.0) > 0.9
    assert likeness(noise=0.0, correlation=4.0) > likeness(noise=0.0, correlation=1.0) > likeness(noise=1.0)
    assert abs(likeness(noise=1.0)) < 0.05


def test_logits_spread_as_documented_from_local_to_global_heads():
    query, key, _ = video_like_qkv(1, (4, 24, 24), 3, 64)
    logits = torch.einsum("bqhd,bkhd->hqk", query, key) / 8
    assert logits[0].std().item() == pytest.approx(3, rel=0.35)
    assert logits[2].std().item() == pytest.approx(1, rel=0.5)
    colder = video_like_qkv(1, (4, 24, 24), 3, 64, temperature=0.5)[0]
    torch.testing.assert_close(colder, 2 * query)


def test_rotary_embedding_is_diffusers_own():
    """Against Wan's: the same angles, at the same features."""
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    grid, head_dim = (3, 4, 5), 64
    tokens = torch.randn(2, 60, head_dim, generator=torch.Generator().manual_seed(0))
    cosine, sine = wan.WanRotaryPosEmbed(head_dim, (1, 1, 1), 32)(torch.empty(1, 1, *grid))
    first, second = tokens[..., 0::2], tokens[..., 1::2]
    expected = torch.empty_like(tokens)
    expected[..., 0::2] = first * cosine[0, :, 0, 0::2] - second * sine[0, :, 0, 1::2]
    expected[..., 1::2] = first * sine[0, :, 0, 1::2] + second * cosine[0, :, 0, 0::2]
    torch.testing.assert_close(rotate(tokens, grid), expected)


def test_with_a_common_vector_tokens_attend_to_what_is_near():
    grid = (4, 12, 12)
    query, key, _ = video_like_qkv(1, grid, 1, 64, position=0.8, noise=0.0)
    logits = (query[0, :, 0] @ key[0, :, 0].T).view(*grid, *grid)
    here = torch.stack([logits[1, row, column, 1, row, column] for row in range(12) for column in range(11)])
    beside = torch.stack([logits[1, row, column, 1, row, column + 1] for row in range(12) for column in range(11)])
    far = torch.stack([logits[1, row, column, 1, row, (column + 6) % 12] for row in range(12) for column in range(11)])
    assert here.mean() > beside.mean() > far.mean()

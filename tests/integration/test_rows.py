"""Another model comes by a row of the table: here one with text before the video, and attention of the older kind."""

import dataclasses
from types import SimpleNamespace

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_processor import Attention
from torch import nn

from psa_diffusers import PSAConfig
from psa_diffusers.integration import PSAProcessor, disable_psa, enable_psa, models, psa_statistics
from psa_diffusers.integration.models import ROWS, find_row
from psa_diffusers.integration.models.row import ModelRow, latent_grid
from psa_diffusers.integration.native import attach
from psa_diffusers.integration.tokens import NO_GRID, TokenLayout

from .tiny_wan import tiny_config, transformer

TEXT = 5


class JointAttnProcessor:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotation=None):
        joint = torch.cat([encoder_hidden_states, hidden_states], 1)
        query, key, value = (
            layer(joint).unflatten(2, (attn.heads, -1)).transpose(1, 2) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        if rotation is not None:
            query, key = query * rotation, key * rotation
        joint = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, dropout_p=0.0)
        return attn.to_out[0](joint.transpose(1, 2).flatten(2))


class JointTransformer(nn.Module, ConfigMixin):
    config_name = "config.json"

    @register_to_config
    def __init__(self, patch_size=(1, 1, 1)):
        super().__init__()
        layers = [Attention(8, heads=2, dim_head=4, processor=JointAttnProcessor()) for _ in range(2)]
        self.blocks = nn.ModuleList(layers)

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        video = hidden_states.flatten(2).transpose(1, 2)
        for block in self.blocks:
            rotation = torch.linspace(0.5, 1.5, TEXT + video.shape[1])[:, None]
            video = block(video, encoder_hidden_states=encoder_hidden_states, rotation=rotation)[:, TEXT:]
        return video


def joint_layout(model, arguments):
    grid = latent_grid(model, arguments)
    text = arguments["encoder_hidden_states"].shape[1]
    return TokenLayout(grid, before=text)


ROW = ModelRow("Joint", ("JointTransformer",), ("JointAttnProcessor",), r"blocks\.\d+", joint_layout)


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(models, "ROWS", (*ROWS, ROW))
    torch.manual_seed(0)
    return JointTransformer().eval()


@torch.no_grad()
def forward(model):
    generator = torch.Generator().manual_seed(0)
    return model(
        torch.randn(1, 8, 3, 4, 5, generator=generator),
        timestep=torch.tensor([1]),
        encoder_hidden_states=torch.randn(1, TEXT, 8, generator=generator),
    )


def test_a_row_is_all_that_a_model_needs(model, recorder):
    native = forward(model)
    enable_psa(model, tiny_config(dense_warmup=0.0))
    with model.blocks[0].processor.step(0, 1):
        torch.testing.assert_close(forward(model), native, rtol=1e-5, atol=1e-6)
    assert recorder.calls == ["sparse"] * 2
    assert recorder.plans[0]["shape"] == (1, TEXT + 60, 2, 4)
    assert recorder.plans[0]["full_tokens"] == slice(0, TEXT) and recorder.plans[0]["grid"] == (3, 4, 5)
    assert torch.equal(forward(disable_psa(model)), native)


def test_text_is_at_full_resolution_in_the_plan(model, monkeypatch):
    from psa_diffusers.integration import operations

    plans, build_plan = [], operations.build_plan

    def kept(*args, **options):
        plans.append(build_plan(*args, **options))
        return plans[-1]

    monkeypatch.setattr(operations, "build_plan", kept)
    enable_psa(model, tiny_config(dense_warmup=0.0, compute_budget=0.5, backend="reference"))
    with model.blocks[0].processor.step(0, 1):
        forward(model)
    assert plans[0].order[-TEXT:].tolist() == list(range(TEXT))
    assert (plans[0].level_mask[..., -2:] == 1).all() and (plans[0].level_mask[:, :, -1] == 1).all()
    assert psa_statistics(model).compute_budget_sparse < 1


def test_the_older_attention_passes_on_the_natives_arguments(model, recorder):
    """It filters arguments by the processor's signature: without it the rotation would be lost without a word."""
    native = forward(model)
    enable_psa(model, tiny_config(dense_warmup=1.0))
    with model.blocks[0].processor.step(0, 1):
        assert torch.equal(forward(model), native)
    assert psa_statistics(model).dense_reasons == {"dense warm-up": 2}


def test_a_grid_that_is_not_known_stays_dense(model, recorder, monkeypatch):
    monkeypatch.setattr(models, "ROWS", (dataclasses.replace(ROW, layout=lambda *_: NO_GRID),))
    native = forward(model)
    model_processor = PSAProcessor(model, tiny_config(dense_warmup=0.0))
    for block in model.blocks:
        block.set_processor(model_processor)
    with model_processor.step(0, 1):
        assert torch.equal(forward(model), native)
    assert model_processor.statistics.dense_reasons == {"token grid unknown": 2}


def test_find_row():
    assert find_row(transformer()) is ROWS[0]
    assert find_row(nn.Linear(1, 1)) is None


@pytest.mark.parametrize(
    ("shape", "channels", "config", "grid"),
    [
        ((1, 16, 5, 8, 12), 1, {"patch_size": (1, 2, 2)}, (5, 4, 6)),
        ((1, 6, 16, 8, 12), 2, {"patch_size": 2, "patch_size_t": 2}, (3, 4, 6)),
        ((1, 6, 16, 8, 12), 2, {"patch_size": 2, "patch_size_t": None}, (6, 4, 6)),
        ((1, 5, 8, 12, 16), 4, {"patch_size": (1, 2, 2)}, (5, 4, 6)),
        ((1, 5, 16), 1, {"patch_size": 2}, None),
    ],
)
def test_latent_grid(shape, channels, config, grid):
    model = SimpleNamespace(config=SimpleNamespace(**config))
    assert latent_grid(model, {"hidden_states": torch.empty(shape)}, channels) == grid


# Self-attention modules of a transformer of its default size, as many as it has blocks.
FULL_SIZE = {
    "WanTransformer3DModel": 40,
    "WanVACETransformer3DModel": 40 + 8,
    "WanAnimateTransformer3DModel": 40,
    "ChronoEditTransformer3DModel": 40,
    "SkyReelsV2Transformer3DModel": 32,
    "HunyuanVideoTransformer3DModel": 20 + 40,
    "HunyuanVideoFramepackTransformer3DModel": 20 + 40,
    "HunyuanVideo15Transformer3DModel": 54,
    "CogVideoXTransformer3DModel": 30,
    "ConsisIDTransformer3DModel": 30,
    "LTXVideoTransformer3DModel": 28,
    "LTX2VideoTransformer3DModel": 48,
    "MochiTransformer3DModel": 48,
    "CosmosTransformer3DModel": 28,
    "Kandinsky5Transformer3DModel": 32,
    "Kandinsky6Transformer3DModel": 60,
    "AllegroTransformer3DModel": 32,
    "EasyAnimateTransformer3DModel": 48,
    "AnyFlowTransformer3DModel": 40,
    "MotifVideoTransformer3DModel": 20 + 40,
    "HeliosTransformer3DModel": 40,
    "MiniMaxH3Transformer3DModel": 50,
}
NO_DEFAULTS = {"EasyAnimateTransformer3DModel": {"in_channels": 16, "out_channels": 16, "patch_size": 2}}


def test_full_size_is_known_for_every_row():
    assert set(FULL_SIZE) == set(models.known_transformers())


@pytest.mark.parametrize("name", FULL_SIZE)
def test_rows_find_the_attention_of_full_size(name):
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    with torch.device("meta"):
        model = getattr(diffusers, name)(**NO_DEFAULTS.get(name, {}))
    slots = [slot for _, slot in attach(model).attention if slot.self_attention]
    assert len(slots) == FULL_SIZE[name] and all(slot.known for slot in slots)
    row, blocks = find_row(model), FULL_SIZE[name]
    layers = [row.layer(model, slot.name) for slot in slots]
    assert set(layers) == set(range(max(layers) + 1)) and max(layers) == blocks - 1 - 8 * ("VACE" in name)


def test_every_family_has_its_presets():
    """Each belongs to one family, takes the budget that it says, and says what that is based on."""
    owned = [name for row in ROWS for name in row.presets]
    assert [row.title for row in ROWS if bool(row.presets) == bool(row.dense)] == []
    known = PSAConfig.presets()
    assert sorted(owned) == sorted(name for name in known if name != "default" and not name.startswith("psa-"))
    for name in owned:
        budget = PSAConfig.preset(name).compute_budget
        assert f"{budget:g}," in known[name] or f"{1 - budget:.2g})" in known[name]
        assert "paper" in known[name] or "bundled model" in known[name]
        assert known[name].endswith("Not yet measured with this package on this model.")

"""What single families do beside the common case: other masks, other modes, fused projections, nothing to sparsify."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch

from psa_diffusers.integration import PSAProcessor, disable_psa, enable_psa, models, psa_statistics
from psa_diffusers.integration.models import ROWS, find_row
from psa_diffusers.integration.processor import installed_processors

from .test_models import ALWAYS, CLOSE, forward
from .tiny_alone import LTX_2, SKYREELS_BLOCKS, coordinates, kandinsky, ltx, ltx_2
from .tiny_hunyuan import hunyuan, motif
from .tiny_models import TINY
from .tiny_parts import REAL, TEXT, noise
from .tiny_wan import tiny_config

GRID = (4, 3, 5)


def run(name, inputs, model=None, **settings):
    """Native and sparse output (by a whole compute budget, unless told otherwise), and the statistics."""
    model = TINY[name].build() if model is None else model
    native = forward(model, copy.deepcopy(inputs))
    enable_psa(model, tiny_config(**{"compute_budget": 1.0, **ALWAYS, **settings}))
    return native, forward(model, inputs), psa_statistics(model)


# -- masks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hunyuan", "mochi"])
def test_a_mask_with_padding_in_the_middle_is_taken_as_the_native_takes_it(name):
    inputs = TINY[name].inputs(GRID, 2)
    inputs["encoder_attention_mask"][0, 1] = 0
    native, sparse, statistics = run(name, inputs)
    torch.testing.assert_close(sparse, native, **CLOSE)
    assert statistics.dense_reasons == {}


def test_motif_runs_dense_where_padding_comes_first():
    inputs = motif(GRID, 2)
    inputs["encoder_attention_mask"] = inputs["encoder_attention_mask"].flip(1)
    native, sparse, statistics = run("motif", inputs)
    assert torch.equal(sparse, native)
    assert statistics.dense_reasons == {"padding before the end of the text": 4}


@pytest.mark.parametrize("name", ["hunyuan", "hunyuan-1.5", "motif"])
def test_another_mask_than_the_padding_runs_dense(name):
    model, inputs = TINY[name].build(), TINY[name].inputs(GRID, 2)

    def hide_a_token(module, args, kwargs):
        mask = kwargs["attention_mask"].clone()
        mask[..., 1] = False
        return args, kwargs | {"attention_mask": mask}

    def hide_a_token_positionally(module, args):
        mask = args[3].clone()
        mask[..., 1] = False
        return (*args[:3], mask, *args[4:])

    block = model.transformer_blocks[0]
    if name == "motif":
        block.register_forward_pre_hook(hide_a_token_positionally)
    else:
        block.attn.register_forward_pre_hook(hide_a_token, with_kwargs=True)
    native, sparse, statistics = run(name, inputs, model)
    torch.testing.assert_close(sparse, native, **CLOSE)
    assert statistics.dense_reasons == {"attention mask": 1}
    assert statistics.sparse_calls == TINY[name].calls - 1


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_masks_of_any_dtype(dtype):
    native, sparse, statistics = run("hunyuan", hunyuan(GRID, 2, dtype))
    torch.testing.assert_close(sparse, native, **CLOSE)
    assert statistics.dense_reasons == {}


def test_a_text_without_padding():
    inputs = TINY["hunyuan"].inputs(GRID, 2)
    inputs["encoder_attention_mask"][:] = 1
    native, sparse, statistics = run("hunyuan", inputs)
    torch.testing.assert_close(sparse, native, **CLOSE)
    assert statistics.compute_budget_sparse == 1.0


@torch.no_grad()
def test_another_prompt_in_the_same_branch_gets_another_plan():
    """With refresh_every a plan is kept: but not for a mask that hides other tokens."""
    model = enable_psa(TINY["hunyuan"].build(), tiny_config(compute_budget=1.0, refresh_every=9, **ALWAYS))
    (processor,) = installed_processors([model])
    plain = copy.deepcopy(model)
    disable_psa(plain)
    for step, real in enumerate((6, 2, 9)):
        inputs = TINY["hunyuan"].inputs(GRID, 1)
        inputs["encoder_attention_mask"] = (torch.arange(TEXT) < real).long()[None]
        with processor.step(step, 9):
            sparse = model(**inputs, return_dict=False)[0]
        torch.testing.assert_close(sparse, plain(**inputs, return_dict=False)[0], **CLOSE)


# -- modes --------------------------------------------------------------------------------------------------------


def test_motifs_decoder_sees_the_video_twice():
    tiny = TINY["motif"]
    torch.manual_seed(0)
    if not hasattr(diffusers, tiny.model):
        pytest.skip(f"no {tiny.model}")
    model = getattr(diffusers, tiny.model)(**tiny.config | {"num_decoder_layers": 1}).eval()
    for text in (TEXT, 4 * 3 * 5):  # as many text tokens as video tokens: their number tells nothing
        inputs = motif(GRID, 2)
        inputs["encoder_hidden_states"] = noise(2, text, 16)
        inputs["encoder_attention_mask"] = (torch.arange(text) < torch.tensor(REAL)[:, None]).long()
        native, sparse, statistics = run("motif", inputs, disable_psa(model))
        torch.testing.assert_close(sparse, native, **CLOSE)
        assert (statistics.sparse_calls, statistics.dense_calls) == (4, 0)


def test_skyreels_by_blocks_of_frames_stays_dense():
    model = diffusers.SkyReelsV2Transformer3DModel(**SKYREELS_BLOCKS).eval()
    native, sparse, statistics = run("skyreels", TINY["skyreels"].inputs(GRID, 1), model)
    assert torch.equal(sparse, native)
    assert statistics.dense_reasons == {"block-causal attention": 2}


def test_kandinskys_own_sparse_attention_is_left_alone():
    model = enable_psa(TINY["kandinsky-5"].build(), tiny_config(**ALWAYS))
    inputs = kandinsky((4, 8, 8), 1) | {"sparse_params": {"to_fractal": True, "sta_mask": None, "P": 0.9}}
    for block in model.visual_transformer_blocks:
        block.self_attention.forward = lambda states, **_: states
    forward(model, inputs)
    slots = [block.self_attention._psa_slot for block in model.visual_transformer_blocks]
    assert psa_statistics(model).sparse_calls == 0 and not any(slot.sparse for slot in slots)


def test_ltx_with_coordinates_that_are_no_grid_stays_dense():
    """The long-video pipeline names a grid of 1 x 1 x 1 and puts frames of other times behind the video."""
    inputs = ltx(GRID, 1) | {"num_frames": 1, "height": 1, "width": 1}
    place = coordinates(GRID)
    for tail, grid in ((0, GRID), (15, None)):
        inputs["video_coords"] = place.clone()[None]
        if tail:
            inputs["video_coords"][0, 0, -tail:] = -1.0
        native, sparse, statistics = run("ltx", inputs)
        torch.testing.assert_close(sparse, native, **CLOSE)
        assert statistics.dense_reasons == ({} if grid else {"token grid unknown": 2})


def test_ltx_2_with_perturbed_blocks():
    """Spatio-temporal guidance leaves attention out: it is not called, and not counted."""
    inputs = ltx_2(GRID, 2) | {"spatio_temporal_guidance_blocks": [0]}
    native, sparse, statistics = run("ltx-2-perturbed", inputs)
    torch.testing.assert_close(sparse, native, **CLOSE)
    assert (statistics.sparse_calls, statistics.dense_calls) == (1, 0)


def test_ltx_2_gets_its_perturbed_natives_back():
    """Also where they were never seen, since the processor was made without the model."""
    model, inputs = TINY["ltx-2-perturbed"].build(), ltx_2(GRID, 1) | {"spatio_temporal_guidance_blocks": [0]}
    native = forward(model, inputs)
    model.set_attn_processor(PSAProcessor(tiny_config()))
    assert torch.equal(forward(disable_psa(model), inputs), native)


def test_ltx_2_with_a_reference_mask_stays_dense():
    if not hasattr(diffusers, "LTX2VideoTransformer3DModel"):
        pytest.skip("no LTX-2")
    model = diffusers.LTX2VideoTransformer3DModel(**LTX_2).eval()
    tokens = GRID[0] * GRID[1] * GRID[2]
    inputs = ltx_2(GRID, 1) | {"video_self_attention_mask": torch.ones(1, tokens, tokens).tril()}
    native, sparse, statistics = run("ltx-2", inputs, model)
    assert torch.equal(sparse, native)
    assert statistics.dense_reasons == {"attention mask": 2}


# -- processors that are replaced ---------------------------------------------------------------------------------


def test_fused_projections_are_reported_and_can_be_sparse_again(caplog):
    name, inputs = "cogvideox", TINY["cogvideox"].inputs(GRID, 2)
    model = TINY[name].build()
    native = forward(model, inputs)
    enable_psa(model, tiny_config(compute_budget=1.0, **ALWAYS))
    (processor,) = installed_processors([model])
    forward(model, inputs)
    model.fuse_qkv_projections()
    assert installed_processors([model]) == []
    with processor.step(1, 2), torch.no_grad():
        model(**inputs)
    assert "PSA no longer runs in 2 attention modules (transformer_blocks.0.attn1, ...)" in caplog.text
    enable_psa(model, tiny_config(compute_budget=1.0, **ALWAYS))
    torch.testing.assert_close(forward(model, inputs), native, **CLOSE)
    assert psa_statistics(model).sparse_calls == 2
    disable_psa(model)
    assert type(model.transformer_blocks[0].attn1.processor).__name__ == "FusedCogVideoXAttnProcessor2_0"
    torch.testing.assert_close(forward(model, inputs), native, **CLOSE)


# -- what stays dense ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [row for row in ROWS if row.dense], ids=lambda row: row.title)
def test_what_cannot_be_sparse_says_why(row, caplog):
    for name in row.transformers:
        model = type(name, (torch.nn.Linear,), {})(2, 2)
        pipe = SimpleNamespace(components={"transformer": model})
        caplog.clear()
        assert enable_psa(pipe) is pipe
        assert f"PSA leaves transformer ({name}) dense: {row.dense}." in caplog.text
        with pytest.raises(ValueError, match="stays dense") as error:
            PSAProcessor(pipe)
        assert row.dense in str(error.value)
        assert disable_psa(pipe) is pipe


def test_every_video_transformer_of_diffusers_is_in_the_table():
    names = [name for name in dir(diffusers) if "Transformer3D" in name and "Image" not in name]
    assert len(names) > 15
    assert [name for name in names if find_row(type(name, (), {})()) is None] == []


def test_rows_are_whole():
    classes = [name for row in ROWS for name in row.transformers]
    assert len(classes) == len(set(classes))
    for row in ROWS:
        given = [
            bool(row.natives),
            bool(row.attention),
            bool(row.layout),
            bool(row.sparse),
            bool(row.text),
            bool(row.grid),
        ]
        assert given == [not row.dense] * 6, row.title
    assert models.known_transformers() == [name for row in ROWS if not row.dense for name in row.transformers]


def test_the_readme_has_the_same_table():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    section = readme.split("## Models\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| model |")]
    assert lines == [
        f"| {row.title} | {row.dense} |" if row.dense else f"| {row.title} | {row.sparse} | {row.text} | {row.grid} |"
        for row in ROWS
    ]

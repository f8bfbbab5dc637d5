"""What PSA cannot use runs dense and is counted, or fails: naming the argument, the rule, the value and a way out."""

import pytest
import torch
from diffusers import StableVideoDiffusionPipeline, TextToVideoSDPipeline, UNet3DConditionModel
from diffusers.models.unets import UNetSpatioTemporalConditionModel

from psa_diffusers.integration import PSAProcessor, disable_psa, enable_psa, psa_statistics

from .checks import kinds
from .tiny_wan import LAYERS, generate, pipeline, tiny_config, transformer


def forward(model, frames=3, height=4, width=6):
    return model(torch.ones(1, 16, frames, height, width), torch.tensor([1]), torch.ones(1, 8, 16))[0]


def sparse_model(**settings):
    model = pipeline().transformer
    processor = PSAProcessor(model, tiny_config(dense_warmup=0.0, **settings))
    model.set_attn_processor(processor)
    return model, processor


# -- pipelines ------------------------------------------------------------------------------------------------------


def unet_3d():
    unet = UNet3DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=4,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    return TextToVideoSDPipeline(vae=None, text_encoder=None, tokenizer=None, unet=unet, scheduler=None)


def unet_spatio_temporal():
    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32),
        num_attention_heads=(2, 2),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        cross_attention_dim=8,
        projection_class_embeddings_input_dim=12,
        addition_time_embed_dim=4,
        sample_size=8,
    )
    return StableVideoDiffusionPipeline(vae=None, image_encoder=None, unet=unet, scheduler=None, feature_extractor=None)


def untouched(parts):
    return {name: type(part) for name, part in parts.attn_processors.items()}


@pytest.mark.parametrize("make", [unet_3d, unet_spatio_temporal])
def test_a_unet_pipeline(make):
    try:
        pipe = make()
    except AttributeError as error:  # a part that is None, in older versions
        pytest.skip(f"this pipeline needs all its parts: {error}")
    before = untouched(pipe.unet)
    for function in (enable_psa, PSAProcessor):
        with pytest.raises(
            ValueError, match=rf"pipe.*video transformer.*{type(pipe).__name__} has.*{type(pipe.unet).__name__}"
        ):
            function(pipe)
    assert untouched(pipe.unet) == before
    assert disable_psa(pipe) is pipe
    with pytest.raises(ValueError, match="PSA is not enabled"):
        psa_statistics(pipe)


def test_a_pipeline_without_any_model():
    pipe = pipeline()
    pipe.transformer = None
    with pytest.raises(ValueError, match=r"pipe must have a video transformer.*has Auto.*Known: WanTransformer3DModel"):
        enable_psa(pipe)


def test_one_of_two_experts_is_missing():
    pipe = pipeline("experts")
    pipe.transformer = None
    enable_psa(pipe, tiny_config())
    assert isinstance(pipe.transformer_2.blocks[0].attn1.processor, PSAProcessor)


# -- sizes ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 5, 7), (3, 5, 7), (2, 13, 9), (7, 4, 22)])
def test_odd_resolutions(size):
    """What does not fill a patch is cut off by the model, and so by the grid."""
    native = forward(pipeline().transformer, *size)
    model, processor = sparse_model(compute_budget=1.0, backend="reference")
    with processor.step(0, 1):
        torch.testing.assert_close(forward(model, *size), native, rtol=1e-4, atol=1e-4)
    statistics = processor.statistics
    assert statistics.sparse_calls == LAYERS and statistics.dense_calls == 0


@pytest.mark.parametrize("size", [(40, 56, 7), (47, 33, 10), (16, 16, 1)])
def test_odd_sizes_given_to_the_pipeline(size):
    """The pipeline rounds them, with its own remark; a video of few tokens stays dense."""
    height, width, frames = size
    run = {"height": height // 16 * 16, "width": width // 16 * 16, "num_frames": frames}
    pipe = pipeline()
    native = generate(pipe, **run)
    sparse = generate(enable_psa(pipe, tiny_config(compute_budget=1.0, backend="reference")), **run)
    torch.testing.assert_close(sparse, native, rtol=1e-4, atol=1e-4)
    if frames == 1:
        assert psa_statistics(pipe).dense_reasons["one block of keys"] == 3 * 2 * LAYERS
        assert kinds(pipe) == "dddd"
    else:
        assert kinds(pipe) == "dsss"


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 2, 4, 5])
def test_fewer_tokens_than_a_block(tokens):
    model, processor = sparse_model()  # blocks of 8 queries and 4 keys
    with processor.step(0, 1):
        output = forward(model, 1, 2, 2 * tokens)
    assert output.isfinite().all()
    if tokens <= 4:
        assert processor.statistics.dense_reasons == {"one block of keys": LAYERS}
    else:
        assert processor.statistics.sparse_calls == LAYERS


@torch.no_grad()
def test_latents_of_another_rank_fail_as_they_do_natively():
    model, processor = sparse_model()
    with processor.step(0, 1), pytest.raises(ValueError, match="not enough values to unpack"):
        model(torch.ones(16, 3, 4, 6), torch.tensor([1]), torch.ones(1, 8, 16))
    with processor.step(0, 1):
        forward(model)  # and nothing is left of it
    assert processor.statistics.sparse_calls == LAYERS


# -- attention ------------------------------------------------------------------------------------------------------

MASKS = {
    "a row a query": torch.ones(18, 18).tril().bool(),
    "a sample": torch.ones(1, 1, 18, 18, dtype=torch.bool),
    "added to the logits": torch.zeros(1, 1, 18, 18).masked_fill(torch.rand(18, 18) < 0.3, -1e4),
    "a head": torch.ones(1, 2, 18, 18, dtype=torch.bool),
    "holes": torch.ones(1, 1, 1, 18, dtype=torch.bool).index_fill(-1, torch.tensor([3, 7]), False),
}


@torch.no_grad()
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks(mask):
    def masked(model):
        model.blocks[0].attn1.register_forward_pre_hook(lambda module, args: (args[0], args[1], mask, args[3]))
        return model

    native = forward(masked(pipeline().transformer))
    model, processor = sparse_model(compute_budget=1.0, backend="reference")
    with processor.step(0, 1):
        torch.testing.assert_close(forward(masked(model)), native, rtol=1e-4, atol=1e-4)
    assert processor.statistics.dense_reasons == {"attention mask": 1}
    assert processor.statistics.sparse_calls == LAYERS - 1


@torch.no_grad()
@pytest.mark.parametrize("head_dim", [6, 10, 34, 130])
def test_head_dims_that_are_no_power_of_two(head_dim):
    model = transformer(attention_head_dim=head_dim)
    native = forward(model)
    processor = PSAProcessor(model, tiny_config(compute_budget=1.0, dense_warmup=0.0))
    model.set_attn_processor(processor)
    with processor.step(0, 1):
        torch.testing.assert_close(forward(model), native, rtol=1e-4, atol=1e-4)
    assert processor.statistics.sparse_calls == LAYERS and processor.statistics.backend == "torch"


def test_a_backend_that_cannot_run_here(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pipe = pipeline()
    native = generate(pipe)
    enable_psa(pipe, tiny_config(backend="triton"))
    with pytest.raises(
        ValueError, match=r"backend 'triton' cannot be used: the tensors are on cpu.*use backend='auto'"
    ):
        generate(pipe)
    generate(enable_psa(pipe, tiny_config()))
    assert psa_statistics(pipe).backend == "torch" and "Triton is not used" in psa_statistics(pipe).backend_reason
    assert torch.equal(generate(disable_psa(pipe)), native)


def test_tensors_on_two_devices_are_refused_by_name():
    from psa_diffusers import pyramid_sparse_attention

    query = torch.randn(1, 18, 2, 12)
    with pytest.raises(ValueError, match="query, key and value must be on one device, but are on cpu, meta, meta"):
        pyramid_sparse_attention(query, query.to("meta"), query.to("meta"), tiny_config())


def test_a_budget_that_the_blocks_cannot_reach():
    with pytest.raises(ValueError, match=r"compute_budget must be at least 1 / kv_block_size = 0\.25.*but is 0\.01"):
        tiny_config(compute_budget=0.01)

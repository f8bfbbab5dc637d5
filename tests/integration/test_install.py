"""Enabling, disabling, and what must not be disturbed."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from psa_diffusers import PSAConfig
from psa_diffusers.integration import PSAProcessor, disable_psa, enable_psa, psa_statistics

from .tiny_wan import KINDS, LAYERS, generate, pipeline, tiny_config, transformer

ALWAYS = {"dense_warmup": 0.0}


def traces(model):
    """All that a transformer holds beside its weights, by module: attributes, hooks, processors."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
    return {
        name: (
            sorted(set(module.__dict__) - {"_diffusers_hook"}),  # diffusers' own, left by any cache_context
            [list(getattr(module, hook).values()) for hook in hooks],
            getattr(module, "processor", None),
        )
        for name, module in model.named_modules()
    }


def transformers(pipe):
    return [model for name in ("transformer", "transformer_2") if (model := getattr(pipe, name, None)) is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_disable_leaves_nothing_behind(kind, recorder):
    pipe = pipeline(kind)
    native = generate(pipe)
    before = [traces(model) for model in transformers(pipe)]
    assert enable_psa(pipe, tiny_config()) is pipe
    generate(pipe)
    assert "sparse" in recorder.calls
    assert disable_psa(pipe) is pipe
    assert [traces(model) for model in transformers(pipe)] == before
    assert torch.equal(generate(pipe), native)
    assert disable_psa(pipe) is pipe  # a second time does nothing


def test_the_one_line_does_the_same_as_enable(recorder):
    pipe = pipeline()
    before = traces(pipe.transformer)
    pipe.transformer.set_attn_processor(PSAProcessor(pipe, tiny_config()))
    by_processor = generate(pipe)
    calls, recorder.calls = recorder.calls, []
    assert psa_statistics(pipe).sparse_calls == 3 * 2 * LAYERS
    assert psa_statistics(pipe).dense_reasons == {"dense warm-up": 2 * LAYERS}  # cross-attention is not counted
    disable_psa(pipe)
    assert traces(pipe.transformer) == before
    assert torch.equal(generate(enable_psa(pipe, tiny_config())), by_processor)
    assert recorder.calls == calls


def test_one_line_for_each_expert_shares_run_and_statistics(recorder):
    pipe = pipeline("experts")
    pipe.transformer.set_attn_processor(PSAProcessor(pipe, tiny_config()))
    pipe.transformer_2.set_attn_processor(PSAProcessor(pipe, tiny_config()))
    generate(pipe, steps=8)
    assert recorder.steps(2 * LAYERS) == "ddssssss"
    assert len(psa_statistics(pipe).steps) == 8
    assert psa_statistics(pipe).sparse_calls == 6 * 2 * LAYERS


def test_enabling_twice_is_enabling_once(recorder):
    pipe = enable_psa(pipeline(), tiny_config())
    once = traces(pipe.transformer)
    first = generate(pipe)
    calls, recorder.calls = recorder.calls, []
    enable_psa(pipe, tiny_config())
    twice = traces(pipe.transformer)
    assert {name: item[:2] for name, item in once.items()} == {name: item[:2] for name, item in twice.items()}
    assert torch.equal(generate(pipe), first) and recorder.calls == calls
    disable_psa(pipe)
    assert isinstance(pipe.transformer.blocks[0].attn1.processor, WanAttnProcessor)


def test_enabling_again_replaces_the_config(recorder):
    pipe = enable_psa(pipeline(), tiny_config())
    generate(enable_psa(pipe, tiny_config(dense_warmup=0.5)))
    assert recorder.steps(2 * LAYERS) == "ddss"
    assert pipe.transformer.blocks[0].attn1.processor.config.dense_warmup == 0.5


def test_presets(recorder):
    pipe = enable_psa(pipeline(), preset="psa-3")
    assert pipe.transformer.blocks[0].attn1.processor.config == PSAConfig.preset("psa-3")
    with pytest.raises(ValueError, match="config or preset, not both"):
        enable_psa(pipe, PSAConfig(), preset="psa-3")
    with pytest.raises(ValueError, match="no preset 'psa-9'"):
        enable_psa(pipe, preset="psa-9")


def test_the_default_config(recorder):
    pipe = enable_psa(pipeline())
    assert pipe.transformer.blocks[0].attn1.processor.config == PSAConfig()
    generate(pipe)  # 18 tokens are fewer than a block of the default size
    assert psa_statistics(pipe).dense_reasons == {"dense warm-up": 4, "one block of keys": 12}


def test_a_dense_layer_that_no_transformer_has():
    for model in (pipeline(), pipeline("experts")):
        with pytest.raises(
            ValueError, match=rf"dense_layers names 2, 99, but transformer has blocks 0 to {LAYERS - 1}"
        ):
            enable_psa(model, tiny_config(dense_layers=(0, 2, 99)))
    pipe = pipeline("experts")
    pipe.transformer_2 = transformer(num_layers=3)
    enable_psa(pipe, tiny_config(dense_layers=(2,)))  # of one of them


def test_cross_attention_keeps_its_native_object():
    pipe = pipeline("i2v")
    natives = [block.attn2.processor for block in pipe.transformer.blocks]
    enable_psa(pipe, tiny_config())
    assert [block.attn2.processor for block in pipe.transformer.blocks] == natives


def test_two_pipelines_do_not_disturb_each_other(recorder):
    one, other, plain = pipeline(), pipeline("v2v"), pipeline()
    enable_psa(one, tiny_config(dense_warmup=0.5))
    enable_psa(other, tiny_config(dense_warmup=0.25))

    def interleave(pipe, index, timestep, inputs):
        if index == 1:
            generate(other, steps=8, strength=0.5)
            generate(plain, steps=3)
        return inputs

    generate(one, steps=4, callback_on_step_end=interleave)
    assert recorder.steps(2 * LAYERS) == "dd" + "dsss" + "ddd" + "ss"
    assert psa_statistics(one).last_step == (3, 4, "sparse")
    assert psa_statistics(other).last_step == (3, 4, "sparse")
    disable_psa(one)
    recorder.calls.clear()
    generate(other, steps=4, strength=1.0)
    assert recorder.steps(2 * LAYERS) == "dsss"


def test_a_transformer_shared_by_two_pipelines(recorder):
    """The pipeline that was enabled last tells the step; the other's is found from the scheduler that they share."""
    from diffusers import WanVideoToVideoPipeline

    one = enable_psa(pipeline(), tiny_config())
    parts = {name: part for name, part in one.components.items() if name not in ("transformer_2",)}
    other = WanVideoToVideoPipeline(**parts)
    other.set_progress_bar_config(disable=True)
    generate(other, steps=8, strength=0.5)
    assert recorder.steps(2 * LAYERS) == "dsss"
    recorder.calls.clear()
    generate(one, steps=4)
    assert recorder.steps(2 * LAYERS) == "dsss"


def test_a_failing_run_leaves_the_pipeline_usable(recorder):
    pipe = pipeline()
    native = generate(pipe)
    enable_psa(pipe, tiny_config())
    recorder.calls.clear()
    whole = generate(pipe)
    recorder.calls.clear()
    for fail_at in (0, 1, 7, 11):  # in dense and sparse calls, at the begin and in the middle of a forward
        recorder.fail_at = fail_at
        with pytest.raises(KeyboardInterrupt):
            generate(pipe)
        recorder.fail_at = None
        recorder.calls.clear()
        assert torch.equal(generate(pipe), whole)
        assert recorder.steps(2 * LAYERS) == "dsss"
        recorder.calls.clear()
    assert torch.equal(generate(disable_psa(pipe)), native)


def test_without_pipeline_or_model_the_first_call_says_what_to_pass():
    pipe = pipeline()
    native = generate(pipe)
    pipe.transformer.set_attn_processor(PSAProcessor(tiny_config()))
    with pytest.raises(ValueError, match=r"set_attn_processor\(PSAProcessor\(pipe, config\)\)"):
        generate(pipe)
    assert torch.equal(generate(disable_psa(pipe)), native)  # the natives are gone: the model's default ones
    pipe.transformer.set_attn_processor(PSAProcessor(tiny_config()))
    assert generate(enable_psa(pipe, tiny_config(dense_warmup=1.0))).equal(native)


def test_a_processor_of_another_model_says_so():
    with pytest.raises(ValueError, match="does not know the native processors of this model"):
        model = transformer()
        model.set_attn_processor(PSAProcessor(pipeline(), tiny_config()))
        model(torch.ones(1, 16, 3, 4, 6), torch.tensor([1]), torch.ones(1, 8, 16))


@pytest.mark.parametrize("thing", [3, "model", object()])
def test_what_is_no_pipeline(thing):
    for function in (enable_psa, disable_psa, PSAProcessor, psa_statistics):
        with pytest.raises(TypeError, match="needs a diffusers pipeline or a transformer"):
            function(thing)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (3, "a int"),
        ({"seed": 1}, "a dict; make one of these settings: PSAConfig.from_dict(settings)"),
        ("psa-3", "a str; a preset is given by name: enable_psa(pipe, preset='psa-3'), or PSAConfig.preset('psa-3')"),
    ],
)
def test_a_config_that_is_none(given, words):
    for function in (enable_psa, PSAProcessor):
        with pytest.raises(TypeError) as error:
            function(pipeline(), given)
        assert str(error.value) == f"PSAProcessor: config must be a PSAConfig, but is {words}."


def test_unknown_transformers_stay_dense_with_a_warning(caplog):
    class MyTransformer(torch.nn.Linear):
        pass

    pipe = SimpleNamespace(components={"transformer": MyTransformer(2, 2)})
    assert enable_psa(pipe) is pipe
    assert (
        "leaves transformer (MyTransformer) dense: PSA does not know this model. It knows WanTransformer3DModel"
        in caplog.text
    )
    with pytest.raises(ValueError, match="that PSA knows, but SimpleNamespace has MyTransformer"):
        PSAProcessor(pipe)
    pipe.components = {"unet": torch.nn.Linear(2, 2)}
    with pytest.raises(ValueError, match=r"SimpleNamespace has Linear\. Use it as it is"):
        enable_psa(pipe)


def test_processors_replaced_later_are_reported_once(recorder, caplog):
    pipe = enable_psa(pipeline(), tiny_config())
    generate(pipe)
    assert caplog.text == ""
    pipe.transformer.blocks[1].attn1.set_processor(WanAttnProcessor())
    recorder.calls.clear()
    generate(pipe, guidance_scale=1.0)
    assert recorder.calls == ["dense", "dense"] + ["sparse", "dense"] * 3
    assert caplog.text.count("PSA no longer runs in 1 attention modules (blocks.1.attn1, ...)") == 1
    pipe.transformer.set_attn_processor(WanAttnProcessor())
    generate(pipe)
    generate(pipe)
    assert caplog.text.count("PSA no longer runs in 1 attention modules (blocks.0.attn1, ...)") == 1
    recorder.calls.clear()
    generate(enable_psa(pipe, tiny_config()))
    assert recorder.steps(2 * LAYERS) == "dsss"


def test_processors_replaced_before_the_first_run_are_reported_too(caplog):
    pipe = enable_psa(pipeline(), tiny_config())
    pipe.transformer.set_attn_processor(WanAttnProcessor())
    generate(pipe)
    assert f"PSA no longer runs in {LAYERS} attention modules (blocks.0.attn1, ...)" in caplog.text


def test_enabling_over_the_one_line_is_no_replacement(caplog):
    """It takes the processor off cross-attention, where the one line had put it."""
    pipe = pipeline()
    pipe.transformer.set_attn_processor(PSAProcessor(pipe, tiny_config()))
    generate(pipe)
    generate(enable_psa(pipe, tiny_config()))
    assert caplog.text == ""


def test_one_expert_alone(recorder):
    pipe = pipeline("experts")
    pipe.transformer_2.set_attn_processor(PSAProcessor(pipe, tiny_config()))
    generate(pipe, steps=8)
    assert recorder.calls.count("sparse") == psa_statistics(pipe).sparse_calls > 0
    (first, total, kind), *_ = psa_statistics(pipe).steps
    assert first >= 2 and total == 8 and kind == "sparse"


def test_a_subclass_of_a_known_transformer_is_known(recorder):
    from diffusers import WanTransformer3DModel

    class Finetune(WanTransformer3DModel):
        pass

    pipe = pipeline()
    pipe.transformer = transformer(Finetune)
    generate(enable_psa(pipe, tiny_config()))
    assert recorder.steps(2 * LAYERS) == "dsss"


def test_statistics_need_psa():
    with pytest.raises(ValueError, match="PSA is not enabled on this WanPipeline"):
        psa_statistics(pipeline())


def test_the_processor_keeps_no_pipeline_alive(recorder):
    pipe = enable_psa(pipeline(), tiny_config())
    processor, watch = pipe.transformer.blocks[0].attn1.processor, weakref.ref(pipe)
    generate(pipe)
    del pipe
    gc.collect()
    assert watch() is None and processor.statistics.sparse_calls > 0


def test_saving_is_as_before(tmp_path, recorder):
    pipe = pipeline()
    pipe.transformer.save_pretrained(tmp_path / "before")
    enable_psa(pipe, tiny_config())
    pipe.transformer.save_pretrained(tmp_path / "after")
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("before", "after")]
    assert files[0] == files[1]
    for name in files[0]:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


def test_nothing_moves_the_global_random_state(recorder):
    pipe = pipeline()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    enable_psa(pipe, tiny_config(**ALWAYS))
    generate(pipe, steps=1)
    assert torch.equal(torch.get_rng_state(), state)

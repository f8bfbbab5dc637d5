"""What changes a transformer's linear layers: LoRA, PEFT, quantised weights. The processors stay where they are."""

import pytest
import torch
from torch import nn

from psa_diffusers.integration import PSAProcessor, disable_psa, enable_psa, psa_statistics

from .checks import check_native_output, kinds
from .tiny_wan import LAYERS, generate, pipeline, tiny_config, transformer

EXACT = {"compute_budget": 1.0, "backend": "reference"}
PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


def processors(pipe):
    return [block.attn1.processor for block in pipe.transformer.blocks]


# -- LoRA and PEFT --------------------------------------------------------------------------------------------------


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="LoRA needs peft")


def lora_config(peft):
    return peft.LoraConfig(r=2, target_modules=PROJECTIONS, init_lora_weights=False)


def lora_weights(peft):
    model = transformer(seed=0)
    model.add_adapter(lora_config(peft))
    return {f"transformer.{name}": weight for name, weight in peft.get_peft_model_state_dict(model).items()}


def test_lora_load_fuse_unload(peft):
    pipe, weights = pipeline(), lora_weights(peft)
    native = generate(pipe)
    pipe.load_lora_weights(weights)
    with_lora = generate(pipe)
    assert (with_lora - native).abs().max() > 0.01
    pipe.unload_lora_weights()

    enable_psa(pipe, tiny_config(**EXACT))
    ours = processors(pipe)
    stages = {
        lambda: pipe.load_lora_weights(weights): with_lora,
        lambda: pipe.fuse_lora(components=["transformer"]): with_lora,
        lambda: pipe.unfuse_lora(components=["transformer"]): with_lora,
        lambda: pipe.set_adapters(pipe.get_active_adapters(), 0.0): native,
        lambda: pipe.unload_lora_weights(): native,
    }
    for change, expected in stages.items():
        change()
        torch.testing.assert_close(generate(pipe), expected, rtol=1e-4, atol=1e-4)
        assert kinds(pipe) == "dsss" and psa_statistics(pipe).sparse_calls == 3 * 2 * LAYERS
        assert processors(pipe) == ours
    torch.testing.assert_close(generate(disable_psa(pipe)), native, rtol=1e-4, atol=1e-4)  # fusing rounds


def test_enabled_with_lora_loaded_and_disabled_without(peft):
    pipe = pipeline()
    native = generate(pipe)
    pipe.load_lora_weights(lora_weights(peft))
    check_native_output(pipe, "ddssssss")
    enable_psa(pipe, tiny_config())
    pipe.unload_lora_weights()
    assert torch.equal(generate(disable_psa(pipe)), native)


@pytest.mark.parametrize("wrapped_first", [True, False])
def test_a_transformer_in_a_peft_model(wrapped_first, peft):
    plain = pipeline()
    torch.manual_seed(3)
    plain.transformer = peft.get_peft_model(plain.transformer, lora_config(peft))
    expected = generate(plain, steps=8)
    if wrapped_first:
        pipe = plain
    else:
        pipe = enable_psa(pipeline(), tiny_config(**EXACT))
        torch.manual_seed(3)
        pipe.transformer = peft.get_peft_model(pipe.transformer, lora_config(peft))
        torch.testing.assert_close(generate(pipe, steps=8), expected, rtol=1e-4, atol=1e-4)
        assert kinds(pipe) == "ddssssss"
        disable_psa(pipe)
    check_native_output(pipe, "ddssssss")
    pipe.transformer.get_base_model().set_attn_processor(PSAProcessor(pipe, tiny_config(**EXACT)))
    torch.testing.assert_close(generate(pipe, steps=8), expected, rtol=1e-4, atol=1e-4)
    assert kinds(pipe) == "ddssssss"


@pytest.mark.parametrize("wrap", [nn.Sequential, lambda model: nn.ModuleDict({"module": model})])
def test_a_wrapped_transformer_is_found(wrap):
    pipe = pipeline()
    wrapped = wrap(pipe.transformer)
    enable_psa(wrapped, tiny_config())
    assert isinstance(processors(pipe)[0], PSAProcessor)
    disable_psa(wrapped)
    assert not isinstance(processors(pipe)[0], PSAProcessor)


# -- quantised weights ----------------------------------------------------------------------------------------------


def quantise_torchao(pipe):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    pipe.transformer.requires_grad_(False)
    quantization.quantize_(pipe.transformer, quantization.Int8WeightOnlyConfig(version=2))
    return type(pipe.transformer.blocks[0].attn1.to_q.weight).__module__


def quantise_bitsandbytes(pipe):
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    for block in pipe.transformer.blocks:
        for name in ("to_q", "to_k", "to_v"):
            linear = getattr(block.attn1, name)
            four_bit = bnb.nn.Linear4bit(linear.in_features, linear.out_features, quant_type="nf4")
            four_bit.load_state_dict(linear.state_dict())
            setattr(block.attn1, name, four_bit.to("cpu"))
    return type(block.attn1.to_q).__module__


def quantise_gguf(pipe):
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0  # blocks of 32 weights
    for block in pipe.transformer.blocks:
        linear = block.ffn.net[2]
        packed = gguf.quants.quantize(linear.weight.detach().numpy(), kind)
        quantised = GGUFLinear(linear.in_features, linear.out_features, compute_dtype=torch.float32)
        quantised.weight, quantised.bias = GGUFParameter(torch.from_numpy(packed), quant_type=kind), linear.bias
        block.ffn.net[2] = quantised
    return type(quantised.weight).__module__


@pytest.mark.parametrize("quantise", [quantise_torchao, quantise_bitsandbytes, quantise_gguf])
def test_quantised_weights(quantise):
    pipe = pipeline()
    native = generate(pipe)
    home = quantise(pipe)
    assert home.startswith(quantise.__name__.removeprefix("quantise_")) or "gguf" in home
    assert 1e-6 < (generate(pipe) - native).norm() / native.norm() < 0.3  # it is quantised, and close
    statistics = check_native_output(pipe, "ddssssss")
    assert statistics["sparse_calls"] == 6 * 2 * LAYERS


def test_quantising_after_enabling_leaves_the_processors():
    pipe = enable_psa(pipeline(), tiny_config(**EXACT))
    ours = processors(pipe)
    quantise_torchao(pipe)
    generate(pipe)
    assert processors(pipe) == ours and kinds(pipe) == "dsss"

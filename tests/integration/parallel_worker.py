"""One of several processes that share a tiny model by Ulysses: ``python -m`` this module FOLDER RANK WORLD.

They run all cases, one after the other, and leave what each one saw in FOLDER/RANK.pt.
"""

from __future__ import annotations

import dataclasses
import datetime
import sys
from pathlib import Path

import diffusers
import torch
import torch.distributed as dist

from psa_diffusers.integration import disable_psa, enable_psa, operations, psa_statistics
from psa_diffusers.integration.processor import installed_processors

from .tiny_models import TINY
from .tiny_wan import generate, pipeline, tiny_config, transformer

LARGE = {"height": 64, "width": 96, "num_frames": 13}  # 4 x 4 x 6 = 96 tokens
ODD = {"height": 48, "width": 48, "num_frames": 9}  # 3 x 3 x 3 = 27 tokens
HEADS = {"num_attention_heads": 4}
KINDS = ("t2v", "i2v", "ti2v", "experts")
FAMILIES = ("ltx", "ltx-condition", "chronoedit", "helios", "minimax")


def make_pipeline(kind: str = "t2v", **settings):
    """A tiny pipeline whose transformers have four heads, if not other settings."""
    pipe = pipeline(kind)
    for seed, name in enumerate(("transformer", "transformer_2")):
        model = getattr(pipe, name, None)
        if model is not None:
            changes = {"in_channels": 36, "added_kv_proj_dim": 48, "image_dim": 4} if kind == "i2v" else {}
            setattr(pipe, name, transformer(seed=seed, **HEADS | changes | settings))
    return pipe


def make_parallel(pipe, names=("transformer", "transformer_2"), **settings):
    from diffusers import ContextParallelConfig

    for name in names:
        if getattr(pipe, name, None) is not None:
            config = ContextParallelConfig(ulysses_degree=dist.get_world_size(), **settings)
            getattr(pipe, name).enable_parallelism(config=config)
    return pipe


def prepare(name):
    """A tiny model of another family and its arguments, of sizes that can be split over two processes."""
    tiny = TINY[name]
    if name == "helios":  # diffusers amplifies the history by its place in the part that a process holds
        tiny = dataclasses.replace(tiny, config=tiny.config | {"is_amplify_history": False})
    grids = {"ltx": (4, 4, 6), "ltx-condition": (3, 5, 3), "helios": (2, 4, 6), "minimax": (4, 5, 5)}
    grid = grids.get(name, tiny.grids[0])
    inputs = tiny.inputs(grid, 1)
    if name.startswith("ltx"):  # diffusers splits the text too, and cannot split its mask
        inputs |= {"encoder_hidden_states": inputs["encoder_hidden_states"][:, :8], "encoder_attention_mask": None}
    return tiny.build(), inputs


@torch.no_grad()
def forward(model, inputs, budget):
    """A sparse call of a model: outputs, plans and statistics."""
    enable_psa(model, tiny_config(compute_budget=budget, dense_warmup=0.0, backend="reference"))
    with Recorder() as plans, installed_processors([model])[0].step(0, 1):
        outputs = model(**inputs, return_dict=False)
    outputs = torch.cat([part.flatten() for part in outputs])
    return {"latents": outputs, "plans": plans, "statistics": psa_statistics(model).to_dict()}


def family(name):
    """What a family's model does in processes; None where this diffusers cannot spread it."""
    model_class = getattr(diffusers, TINY[name].model, None)
    if getattr(model_class, "_cp_plan", None) is None:
        return None
    model, inputs = prepare(name)
    parts = {part for part, _ in model.named_modules()}
    plan = {part: split for part, split in model._cp_plan.items() if "*" in part or part in parts}  # of fewer blocks
    config = diffusers.ContextParallelConfig(ulysses_degree=dist.get_world_size())
    model.enable_parallelism(config=config, cp_plan=plan)
    return forward(model, inputs, budget=0.5)


class Recorder:
    """The queries, keys and values of each plan that was made, and its levels."""

    def __init__(self):
        self.made, self._build_plan = [], operations.build_plan

    def __enter__(self):
        operations.build_plan = self._record
        return self.made

    def __exit__(self, *_):
        operations.build_plan = self._build_plan

    def _record(self, query, key, value, config, **options):
        plan = self._build_plan(query, key, value, config, **options)
        self.made.append({"tensors": (query, key, value), "grid": options["grid"], "levels": plan.level_mask})
        return plan


def run(pipe, config, size=LARGE, **settings):
    """A sparse run: latents, plans and statistics."""
    with Recorder() as plans:
        latents = generate(enable_psa(pipe, config), steps=4, **size | settings)
    return {"latents": latents, "plans": plans, "statistics": psa_statistics(pipe).to_dict()}


def sparse_cases() -> dict:
    """Name -> (kind, settings of the model, PSA config, size, settings of context parallel)."""
    sparse = tiny_config(compute_budget=0.4, backend="reference")
    cases = {kind: (kind, {}, sparse, LARGE, {}) for kind in KINDS}
    cases["kept plans"] = ("t2v", {}, tiny_config(refresh_every=2, backend="torch"), LARGE, {})
    cases["top-k"] = ("t2v", {}, tiny_config(rule="topk", level_fractions=(0.3, 0.3), compute_budget=None), LARGE, {})
    # diffusers gives the last process fewer heads and tokens.
    uneven = {"num_attention_heads": 5}
    cases["uneven"] = ("t2v", uneven, sparse, ODD, {"ulysses_anything": True})
    return cases


def one_expert_parallel():
    """Only one of two transformers that share a processor is spread over the processes."""
    pipe = make_pipeline("experts")
    enable_psa(pipe, tiny_config(backend="reference"))
    return run(make_parallel(pipe, names=("transformer",)), tiny_config(backend="reference"))


def enabled_before_parallel():
    pipe = enable_psa(make_pipeline(), tiny_config(backend="reference"))
    return run(make_parallel(pipe), tiny_config(backend="reference"))


def disabled_again():
    pipe = make_parallel(make_pipeline())
    native = generate(pipe, steps=2, **LARGE)
    run(pipe, tiny_config(backend="reference"))
    return {"equal": torch.equal(generate(disable_psa(pipe), steps=2, **LARGE), native)}


def other_tokens(**settings):
    """A model that drops a frame behind the patch embedding: the sequence is not the grid's."""
    pipe = make_parallel(make_pipeline(), **settings)
    model = pipe.transformer
    model.patch_embedding.register_forward_hook(lambda module, args, output: output[:, :, :2].contiguous())
    model.rope.register_forward_hook(lambda module, args, output: tuple(part[:, :24] for part in output))
    model.proj_out.register_forward_hook(lambda module, args, output: torch.cat([output, output], 1))
    generate(enable_psa(pipe, tiny_config()), steps=2, **LARGE)
    return psa_statistics(pipe).to_dict()


def error_of(pipe, size=LARGE):
    try:
        generate(enable_psa(pipe, tiny_config()), steps=2, **size)
    except ValueError as error:
        return str(error)


def ring():
    """What is said where ring attention is on, before or after PSA is enabled."""
    from diffusers import ContextParallelConfig

    said = []
    for enabled_first in (False, True):
        pipe = make_pipeline()
        if enabled_first:
            enable_psa(pipe, tiny_config())
        try:
            pipe.transformer.enable_parallelism(config=ContextParallelConfig(ring_degree=dist.get_world_size()))
            generate(pipe if enabled_first else enable_psa(pipe, tiny_config()), steps=2, **LARGE)
        except ValueError as error:
            said.append(str(error))
    return said


def compiled():
    pipe = make_parallel(make_pipeline())
    enable_psa(pipe, tiny_config(backend="reference"))
    pipe.transformer.compile_repeated_blocks(backend="aot_eager")
    return run(pipe, tiny_config(backend="reference"))


def cases(has_anything: bool) -> dict:
    results = {}
    for name, (kind, model, config, size, parallel) in sparse_cases().items():
        if has_anything or not (parallel or kind == "i2v"):  # 0.36 cannot split the text of image-to-video
            results[name] = run(make_parallel(make_pipeline(kind, **model), **parallel), config, size)
    results |= {name: family(name) for name in FAMILIES}
    results["one expert"] = one_expert_parallel()
    results["enabled before"] = enabled_before_parallel()
    results["disabled again"] = disabled_again()
    results["other tokens"] = other_tokens()
    if has_anything:
        results["other tokens, uneven"] = other_tokens(ulysses_anything=True)
    results["heads"] = error_of(make_parallel(make_pipeline(num_attention_heads=3)))
    results["tokens"] = error_of(make_parallel(make_pipeline()), ODD)
    results["ring"] = ring()
    results["compiled"] = compiled()
    return results


def gather_uneven(tensor, dim, group):
    """In place of diffusers' gathering of parts of different sizes, which gloo does not do as NCCL does."""
    parts = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, tensor, group=group)
    return torch.cat(parts, dim=dim)


def main(folder: str, rank: str, world: str) -> None:
    from diffusers import ContextParallelConfig
    from diffusers.hooks import context_parallel

    torch.set_num_threads(1)
    # Without an accelerator diffusers finds no device for a process; gloo and the CPU do for all that follows.
    torch._C._get_accelerator = lambda *_: torch.device("cpu")
    torch.accelerator.device_count = lambda: 1
    store = dist.FileStore(f"{folder}/store", int(world))
    patience = datetime.timedelta(seconds=600)
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=int(world), timeout=patience)
    context_parallel._all_gather_anything = gather_uneven
    results = cases("ulysses_anything" in ContextParallelConfig.__dataclass_fields__)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

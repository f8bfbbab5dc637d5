"""Experiment: give pooled keys back the covariance of keys and values that pooling takes from them.

A pooled group answers a query with its mean value. To first order the group's true answer also has the term
scale x C q, C the covariance of the group's values with its keys. Where keys and values are projections of noise-like
tokens, as in first layers, C is alike in all groups, so that what is lost adds up over every pooled block. Here one C a
head and level, the mean over all groups, is given back in proportion to the attention that the level gets: a d x d
product a query and level, next to nothing beside attention.

Prints the relative error of the transformer's output (guidance applied) on noisy latents of a dense run, by rule, with
and without the correction, for all layers sparse and for the first alone. A dense computation: it measures error, not
speed.

Example: python scripts/covariance_experiment.py --prompt "an orange square falls on a white background"
"""

from __future__ import annotations

import argparse
import json

import torch
from diffusers import DiffusionPipeline

from psa_diffusers import PSAConfig, disable_psa, enable_psa
from psa_diffusers.demo import model_defaults, model_folder
from psa_diffusers.integration import operations
from psa_diffusers.integration.processor import installed_processors

RULES = {
    "budget rule": {"compute_budget": 0.15},
    "PSA-3 shares": {"rule": "topk", "level_fractions": (0.09, 0.06, 0.12, 0.0)},
    "binary": {"rule": "topk", "level_fractions": (0.15, 0.0, 0.0, 0.0)},
}


def pool(tokens: torch.Tensor, group: int) -> torch.Tensor:
    """[seq, dim] with each token replaced by the mean of its group of consecutive tokens."""
    return tokens.unflatten(0, (-1, group)).mean(1, keepdim=True).expand(-1, group, -1).flatten(0, 1)


def attend_head(query, key, value, levels, plan, scale: float, corrected: bool) -> torch.Tensor:
    """One head [seq, dim] in block order, whole blocks only; ``levels`` is [seq, seq]."""
    groups = [2 ** (level - 1) for level in range(1, plan.num_levels + 1)] + [plan.kv_block_size]
    keys, values = [pool(key, group) for group in groups], [pool(value, group) for group in groups]
    logits = torch.full(levels.shape, -torch.inf)
    for level, pooled in enumerate(keys, start=1):
        logits = torch.where(levels == level, query @ pooled.T * scale, logits)
    weights, out = logits.softmax(1), torch.zeros_like(query)
    for level, (pooled_key, pooled_value) in enumerate(zip(keys, values, strict=True), start=1):
        part = torch.where(levels == level, weights, 0.0)
        out += part @ pooled_value
        if corrected:
            covariance = (value - pooled_value).T @ (key - pooled_key) / len(key)
            out += part.sum(1, keepdim=True) * (query @ covariance.T) * scale
    return out


def attention(corrected: bool):
    """A stand-in for the attention operation."""

    def attend(query, key, value, config, plan, scale):
        seq, scale, out = query.shape[1], scale or query.shape[-1] ** -0.5, torch.empty_like(query)
        for head in range(query.shape[2]):
            levels = plan.level_mask[0, head].repeat_interleave(plan.query_block_size, 0)
            levels = levels.repeat_interleave(plan.kv_block_size, 1)[:seq, :seq]
            rows = (tensor[0, plan.order, head] for tensor in (query, key, value))
            out[0, plan.order, head] = attend_head(*rows, levels, plan, scale, corrected)
        return out

    return attend


@torch.no_grad()
def predict(pipe, calls: list[dict], config: PSAConfig | None = None) -> torch.Tensor:
    """The guided velocity of one denoising step: calls are those with the prompt and without it."""
    if config is None:
        outputs = [pipe.transformer(**call)[0] for call in calls]
    else:
        enable_psa(pipe, config)
        processor = installed_processors([pipe.transformer])[0]
        with processor.step(0, 1):
            outputs = [pipe.transformer(**call)[0] for call in calls]
        disable_psa(pipe)
    return outputs[1] + 3.0 * (outputs[0] - outputs[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--step", type=int, default=4, help="the step whose latents are used")
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()
    pipe, defaults = DiffusionPipeline.from_pretrained(model_folder()), model_defaults(model_folder())
    size = {name: defaults[name] for name in ("num_frames", "height", "width")}
    recorded: list[dict] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *call: recorded.append(call[2]), with_kwargs=True)
    noise = torch.Generator().manual_seed(0)
    pipe(args.prompt, **size, num_inference_steps=args.steps, guidance_scale=3.0, generator=noise, output_type="latent")
    hook.remove()
    calls = recorded[2 * args.step : 2 * args.step + 2]
    truth, layers, rows = predict(pipe, calls), range(pipe.transformer.config.num_layers), []
    for rule, settings in RULES.items():
        for corrected in (False, True):
            operations.attend = attention(corrected)
            row = {"rule": rule, "covariance correction": corrected}
            for name, sparse in (("all layers", layers), ("first layer", [0])):
                dense = tuple(layer for layer in layers if layer not in sparse)
                output = predict(pipe, calls, PSAConfig(dense_warmup=0.0, dense_layers=dense, **settings))
                row[name] = round(float((output - truth).norm() / truth.norm()), 4)
            rows.append(row)
            print(row, flush=True)
    if args.out:
        record = {"prompt": args.prompt, "steps": args.steps, "step": args.step, "rows": rows}
        with open(args.out, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()

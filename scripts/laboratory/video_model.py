"""Whole videos of the bundled model in batches of prompts: dense, or with any setting in place of its attention."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from block_policies import estimator_share
from torch import Tensor
from video_settings import Planner, Setting

from psa_diffusers import PSAConfig, disable_psa, enable_psa
from psa_diffusers.cli.pipeline import find_model, load_pipeline
from psa_diffusers.integration import psa_statistics
from psa_diffusers.integration.schedule import DENSE_LAST, DENSE_WARMUP
from psa_diffusers.metrics.step_timer import StepTimer


@dataclass(frozen=True)
class Clips:
    """A batch that was made.

    Attributes:
        frames: uint8 [batch, frames, height, width, 3], on the model's device.
        costs: Of each clip, the mean compute budget over its sparse calls; empty for a dense run.
        estimator: FLOPs of what chose, as a share of dense attention's.
        dense_seconds, sparse_seconds: Median of the batch's dense, and sparse, steps; None without any.
    """

    frames: Tensor
    costs: list[float]
    estimator: float
    dense_seconds: float | None
    sparse_seconds: float | None


class VideoModel:
    """The bundled model on a device.

    Args:
        dtype: Of the transformer and the text encoder; latents and the VAE are float32.
        size: Pipeline arguments num_frames, height, width, num_inference_steps and guidance_scale, where they differ
            from the model's own.
    """

    def __init__(self, device: str = "cpu", dtype: str = "float32", model: str | None = None, **size: Any) -> None:
        source = find_model(model)
        self.pipe = load_pipeline(source, dtype, device)
        self.device, self.identity = torch.device(device), source.identity()
        defaults = source.defaults()
        names = ("num_frames", "height", "width", "num_inference_steps", "guidance_scale")
        self.size = {name: defaults[name] for name in names} | {k: v for k, v in size.items() if v is not None}
        self.negative_prompt = defaults.get("negative_prompt") or None

    def with_steps(self, steps: int) -> VideoModel:
        """The same pipeline, run with as many steps."""
        other = copy.copy(self)
        other.size = {**self.size, "num_inference_steps": steps}
        return other

    @property
    def steps(self) -> int:
        return self.size["num_inference_steps"]

    def noise_levels(self) -> list[float]:
        """Of every step's start, and of the last one's end."""
        self.pipe.scheduler.set_timesteps(self.steps)
        return self.pipe.scheduler.sigmas.tolist()

    def dense(self, prompts: Sequence[str], seeds: Sequence[int]) -> Clips:
        frames, seconds = self._run(prompts, seeds, None)
        return Clips(frames, [], 0.0, median(seconds), None)

    def sparse(self, prompts: Sequence[str], seeds: Sequence[int], setting: Setting) -> Clips:
        """Raises RuntimeError where calls ran dense for another reason than the setting's."""
        planner = Planner(setting.choose, setting.budgets(self.noise_levels()), setting.layers)
        shares = {"dense_warmup": setting.dense_first / self.steps, "dense_last": setting.dense_last / self.steps}
        enable_psa(self.pipe, PSAConfig(**shares, refresh_every=setting.refresh_every))
        try:
            with planner.installed():
                frames, seconds = self._run(prompts, seeds, planner)
            reasons = psa_statistics(self.pipe).dense_reasons
        finally:
            disable_psa(self.pipe)
        if set(reasons) - {DENSE_WARMUP, DENSE_LAST}:
            raise RuntimeError(f"{setting}: calls ran dense: {reasons}.")
        costs = torch.stack(planner.costs).mean(0).tolist()
        end = self.steps - setting.dense_last
        sparse = seconds[setting.dense_first : end]
        dense = seconds[: setting.dense_first] + seconds[end:]
        own = isinstance(setting.choose, PSAConfig)
        estimator = estimator_share(setting.choose) if own else planner.estimator
        return Clips(frames, costs, estimator, median(dense) if dense else None, median(sparse))

    @torch.no_grad()
    def _run(self, prompts: Sequence[str], seeds: Sequence[int], planner: Planner | None) -> tuple[Tensor, list[float]]:
        """Frames, and the seconds of every step. A prompt's noise is its seed's, whatever the batch and the device."""
        timer = StepTimer(self.pipe, self.device)

        def on_step_end(pipe: Any, step: int, timestep: Any, values: dict) -> dict:
            timer.mark()
            if planner is not None:
                planner.step = step + 1
            return {}

        try:
            latents = self.pipe(
                list(prompts),
                negative_prompt=[self.negative_prompt or ""] * len(prompts),
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                callback_on_step_end=on_step_end,
                output_type="latent",
                **self.size,
            ).frames
        finally:
            timer.close()
        return self.decode(latents), timer.seconds()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """uint8 [batch, frames, height, width, 3] of latents [batch, channels, frames, height, width]; as pipelines
        decode, but that pictures stay on the device."""
        vae = self.pipe.vae
        of_channels = [torch.tensor(x).view(1, -1, 1, 1, 1).to(latents) for x in self._channels()]
        video = vae.decode((latents / (1.0 / of_channels[1]) + of_channels[0]).to(vae.dtype)).sample
        if not bool(video.isfinite().all()):
            raise RuntimeError("VideoModel: the model produced NaN or infinite pictures; try dtype float32.")
        pictures = (video.float() / 2 + 0.5).clamp(0, 1) * 255
        return pictures.round().to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()

    def _channels(self) -> tuple[list[float], list[float]]:
        return self.pipe.vae.config.latents_mean, self.pipe.vae.config.latents_std

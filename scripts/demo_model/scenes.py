"""Procedurally drawn clips: one shape of one colour moves across a plain background.

A scene is defined in relative coordinates (the frame is the unit square, the clip lasts from 0 to 1), so that the same
content can be drawn at any number of frames and any size.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star")
MOTIONS = ("left", "right", "up", "down")
PALETTE = {
    "red": (220, 40, 40),
    "orange": (245, 130, 30),
    "yellow": (245, 220, 50),
    "green": (40, 170, 70),
    "blue": (40, 90, 225),
    "purple": (150, 50, 180),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "white": (245, 245, 245),
}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
BACKGROUNDS = ("black", "gray", "white", "yellow", "green", "blue")
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
FPS = 16
HELD_OUT = 100


@dataclass(frozen=True, order=True)
class Combination:
    """What a caption says; the jitter of a scene is not in it."""

    shape: str
    colour: str
    motion: str
    background: str


@dataclass(frozen=True)
class Scene:
    """One drawable clip. Lengths are shares of the frame; `start` is the object's centre (x, y) at time 0."""

    what: Combination
    radius: float
    start: tuple[float, float]
    travel: float

    def centre(self, time: np.ndarray) -> np.ndarray:
        """Centre (x, y) at relative times in 0..1: [len(time), 2]."""
        direction = np.array(DIRECTIONS[self.what.motion])
        return np.array(self.start) + time[:, None] * self.travel * direction


def combinations() -> list[Combination]:
    """Every (shape, colour, motion, background) whose object differs in colour from the background, in fixed order."""
    product = itertools.product(SHAPES, COLOURS, MOTIONS, BACKGROUNDS)
    return [Combination(*values) for values in product if values[1] != values[3]]


def held_out_combinations() -> list[Combination]:
    """The combinations that training never sees: a fixed random choice."""
    return sorted(random.Random(2024).sample(combinations(), HELD_OUT))


def training_combinations() -> list[Combination]:
    """All combinations but the held-out ones."""
    held_out = set(held_out_combinations())
    return [what for what in combinations() if what not in held_out]


def random_scene(what: Combination, rng: random.Random) -> Scene:
    """A scene that starts on the side opposed to its direction and crosses the middle, with a little jitter."""
    travel = rng.uniform(0.44, 0.56)
    along = np.array(DIRECTIONS[what.motion])
    across = np.abs(along[::-1])
    middle = 0.5 - along * travel / 2
    start = middle + np.abs(along) * rng.uniform(-0.03, 0.03) + across * rng.uniform(-0.12, 0.12)
    return Scene(what, radius=rng.uniform(0.17, 0.21), start=(float(start[0]), float(start[1])), travel=travel)


def shape_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the outline of a shape of about unit radius; negative inside, y points down."""
    if shape == "circle":
        return np.hypot(x, y) - 1.0
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.9
    if shape == "triangle":
        slanted = np.abs(x) * np.float32(0.8660254) - y * np.float32(0.5)
        return np.maximum(slanted, y) - 0.62
    if shape == "star":
        return _star_distance(x, y)
    raise ValueError(f"shape must be one of {SHAPES}, got {shape!r}")


def _star_distance(x: np.ndarray, y: np.ndarray, outer: float = 1.25, inner: float = 0.55) -> np.ndarray:
    """Five-pointed star: fold the plane into one half of a point and measure to its edge."""
    angle = np.arctan2(x, -y)
    sector = 2 * np.pi / 5
    angle = np.abs((angle + sector / 2) % sector - sector / 2)
    radius = np.hypot(x, y)
    px, py = radius * np.cos(angle), radius * np.sin(angle)
    tip = np.array([outer, 0.0])
    notch = inner * np.array([np.cos(sector / 2), np.sin(sector / 2)])
    edge = (notch - tip) / np.linalg.norm(notch - tip)
    normal = np.array([edge[1], -edge[0]])
    normal *= np.sign(normal @ tip)
    return (px - tip[0]) * np.float32(normal[0]) + (py - tip[1]) * np.float32(normal[1])


def render(scene: Scene, frames: int, height: int, width: int) -> np.ndarray:
    """Draw a scene: float32 [frames, height, width, 3] in 0..1, anti-aliased over one pixel."""
    time = np.linspace(0.0, 1.0, frames) if frames > 1 else np.array([0.5])
    centres = scene.centre(time).astype(np.float32)
    xs = (np.arange(width, dtype=np.float32) + 0.5) / width
    ys = (np.arange(height, dtype=np.float32) + 0.5) / height
    colour = np.array(PALETTE[scene.what.colour], np.float32) / 255
    background = np.array(PALETTE[scene.what.background], np.float32) / 255
    video = np.broadcast_to(background, (frames, height, width, 3)).copy()
    softness = scene.radius * min(height, width)
    reach = 1.35 * scene.radius
    for frame, (cx, cy) in zip(video, centres, strict=True):
        columns = np.flatnonzero(np.abs(xs - cx) < reach)
        rows = np.flatnonzero(np.abs(ys - cy) < reach)
        if not len(rows) or not len(columns):
            continue
        window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        x = (xs[window[1]][None, :] - cx) / np.float32(scene.radius)
        y = (ys[window[0]][:, None] - cy) / np.float32(scene.radius)
        x, y = np.broadcast_arrays(x, y)
        alpha = np.clip(0.5 - shape_distance(scene.what.shape, x, y) * softness, 0.0, 1.0)[..., None]
        frame[window] = background + alpha.astype(np.float32) * (colour - background)
    return video

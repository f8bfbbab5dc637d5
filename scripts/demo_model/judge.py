"""Say what a video shows, by plain image measurements: shape, colour, direction of motion, background.

Nothing here is learnt and nothing knows the model. The background is the nearest named colour (in CIE Lab) to the
median of the frame's border; the object is what differs from it; the shape is the template of equal area that overlaps
it best; the direction is the larger component of the centroid's regression over time.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache

import numpy as np
from scenes import PALETTE, SHAPES, Combination, shape_distance
from skimage.color import rgb2lab
from skimage.measure import label, regionprops
from skimage.morphology import erosion

UNKNOWN = "unknown"
TEMPLATE_SIZE = 64
OBJECT_CONTRAST = 25.0
MINIMUM_AREA = 0.01
MINIMUM_OVERLAP = 0.75
MINIMUM_TRAVEL = 0.1


@dataclass(frozen=True)
class Verdict:
    """What the video shows; `unknown` where the measurement is not clear."""

    shape: str
    colour: str
    motion: str
    background: str
    overlap: float
    travel: float

    def agrees(self, what: Combination) -> dict[str, bool]:
        """For each property, whether it is the one asked for."""
        return {name: getattr(self, name) == value for name, value in asdict(what).items()}


def judge(video: np.ndarray) -> Verdict:
    """Measure a video [frames, height, width, 3], uint8 or float in 0..1."""
    video = np.asarray(video)
    if video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(f"video must be [frames, height, width, 3], got shape {video.shape}")
    frames = video[:: max(1, len(video) // 16)]
    lab = rgb2lab(frames)
    background = np.median(_border(lab), axis=0)
    masks = [_object_mask(frame, background) for frame in lab]
    found = [(time, mask) for time, mask in enumerate(masks) if mask is not None]
    background_name = _nearest(background)
    if len(found) < max(2, len(masks) // 2):
        return Verdict(UNKNOWN, UNKNOWN, UNKNOWN, background_name, 0.0, 0.0)
    colours = [np.median(lab[time][_inside(mask)], axis=0) for time, mask in found]
    shape, overlap = _shape([mask for _, mask in found])
    motion, travel = _motion(found, len(masks))
    return Verdict(shape, _nearest(np.median(colours, axis=0)), motion, background_name, overlap, travel)


def _border(lab: np.ndarray) -> np.ndarray:
    """Pixels of the outer sixteenth of every frame: [pixels, 3]."""
    rows, columns = max(1, lab.shape[1] // 16), max(1, lab.shape[2] // 16)
    edge = np.ones(lab.shape[1:3], bool)
    edge[rows:-rows, columns:-columns] = False
    return lab[:, edge].reshape(-1, 3)


def _nearest(lab: np.ndarray) -> str:
    names = list(PALETTE)
    palette = rgb2lab(np.array([PALETTE[name] for name in names], np.uint8)[None])[0]
    return names[int(np.argmin(np.linalg.norm(palette - lab, axis=1)))]


def _object_mask(lab: np.ndarray, background: np.ndarray) -> np.ndarray | None:
    """The largest connected region that differs from the background, or None when it is too small."""
    regions = label(np.linalg.norm(lab - background, axis=-1) > OBJECT_CONTRAST)
    sizes = np.bincount(regions.ravel())[1:]
    if not len(sizes) or sizes.max() < MINIMUM_AREA * regions.size:
        return None
    return regions == 1 + int(np.argmax(sizes))


def _inside(mask: np.ndarray) -> np.ndarray:
    """The mask without its blended outline."""
    eroded = erosion(erosion(mask))
    return eroded if eroded.any() else mask


def _motion(found: list[tuple[int, np.ndarray]], count: int) -> tuple[str, float]:
    """Direction of the centroid's straight-line fit, and how far it goes as a share of the frame."""
    times = np.array([time for time, _ in found]) / (count - 1)
    height, width = found[0][1].shape
    centres = np.array([np.argwhere(mask).mean(0) for _, mask in found]) / (height, width)
    dy, dx = (np.polyfit(times, centres[:, axis], 1)[0] for axis in (0, 1))
    travel = float(max(abs(dx), abs(dy)))
    if travel < MINIMUM_TRAVEL or min(abs(dx), abs(dy)) > 0.6 * travel:
        return UNKNOWN, travel
    if abs(dx) > abs(dy):
        return ("right" if dx > 0 else "left"), travel
    return ("down" if dy > 0 else "up"), travel


def _shape(masks: list[np.ndarray]) -> tuple[str, float]:
    """The shape whose template overlaps best on average, and that overlap (intersection over union)."""
    whole = [mask for mask in masks if not _touches_border(mask)] or masks
    scores = {name: np.mean([_overlap(_scaled(mask), _template(name)) for mask in whole]) for name in SHAPES}
    best = max(scores, key=scores.get)
    overlap = float(scores[best])
    return (best if overlap >= MINIMUM_OVERLAP else UNKNOWN), overlap


def _touches_border(mask: np.ndarray) -> bool:
    return bool(mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


def _scaled(mask: np.ndarray) -> np.ndarray:
    """The mask moved to its centroid and scaled to unit area: [TEMPLATE_SIZE, TEMPLATE_SIZE] over -1..1."""
    region = regionprops(mask.astype(np.uint8))[0]
    grid = (np.arange(TEMPLATE_SIZE) + 0.5) / TEMPLATE_SIZE * 2 - 1
    side = np.sqrt(region.area)
    rows = np.rint(region.centroid[0] + grid * side).astype(int)
    columns = np.rint(region.centroid[1] + grid * side).astype(int)
    inside = ((rows >= 0) & (rows < mask.shape[0]))[:, None] & ((columns >= 0) & (columns < mask.shape[1]))[None]
    sampled = mask[np.clip(rows, 0, mask.shape[0] - 1)][:, np.clip(columns, 0, mask.shape[1] - 1)]
    return sampled & inside


@cache
def _template(shape: str) -> np.ndarray:
    axis = np.linspace(-1.5, 1.5, 300)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return _scaled(shape_distance(shape, x, y) < 0)

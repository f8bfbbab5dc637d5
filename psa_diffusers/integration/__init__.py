"""What knows diffusers: the attention processor, its schedule, and the ways to install, remove and watch it."""

from .capture import AttentionCall, capture_attention
from .install import disable_psa, enable_psa, psa_calibration, psa_statistics
from .level_masks import LevelMask, capture_level_masks
from .processor import PSAProcessor
from .statistics import PSAStatistics
from .watching import ErrorWatch, watch_errors

__all__ = [
    "AttentionCall",
    "ErrorWatch",
    "LevelMask",
    "PSAProcessor",
    "PSAStatistics",
    "capture_attention",
    "capture_level_masks",
    "disable_psa",
    "enable_psa",
    "psa_calibration",
    "psa_statistics",
    "watch_errors",
]

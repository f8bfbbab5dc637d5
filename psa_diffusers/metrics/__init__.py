"""How close two videos are, how they are read and written, and how long their steps take.

Videos are uint8 [frames, height, width, 3].
"""

from .flicker import flicker_of_changes, temporal_flicker
from .intervals import Mean, mean_with_interval
from .lpips import LPIPSResult, lpips
from .psnr import psnr, psnr_of_frames
from .relative_error import relative_error
from .ssim import ssim, ssim_of_frames
from .step_timer import StepTimer
from .video_io import check_video, read_video, to_uint8, write_lossless, write_video

__all__ = [
    "LPIPSResult",
    "Mean",
    "StepTimer",
    "check_video",
    "flicker_of_changes",
    "lpips",
    "mean_with_interval",
    "psnr",
    "psnr_of_frames",
    "read_video",
    "relative_error",
    "ssim",
    "ssim_of_frames",
    "temporal_flicker",
    "to_uint8",
    "write_lossless",
    "write_video",
]

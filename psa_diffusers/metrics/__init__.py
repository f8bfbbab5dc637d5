"""How close two videos are, how they are read and written, and how long their steps take.

Videos are uint8 [frames, height, width, 3].
"""

from .lpips import LPIPSResult, lpips
from .psnr import psnr
from .relative_error import relative_error
from .ssim import ssim
from .step_timer import StepTimer
from .video_io import check_video, read_video, to_uint8, write_video

__all__ = [
    "LPIPSResult",
    "StepTimer",
    "check_video",
    "lpips",
    "psnr",
    "read_video",
    "relative_error",
    "ssim",
    "to_uint8",
    "write_video",
]

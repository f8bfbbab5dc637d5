"""How close two videos are, and how to read and write them. Videos are uint8 [frames, height, width, 3]."""

from .lpips import LPIPSResult, lpips
from .psnr import psnr
from .ssim import ssim
from .video_io import check_video, read_video, to_uint8, write_video

__all__ = ["LPIPSResult", "check_video", "lpips", "psnr", "read_video", "ssim", "to_uint8", "write_video"]

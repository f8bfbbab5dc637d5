"""Videos as arrays: uint8 [frames, height, width, 3], as H.264 mp4 files, and as lossless ones."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import imageio.v2 as imageio
import numpy as np

# Visually lossless H.264, in a file that starts to play before it is read whole. With a given number of threads x264
# writes the same file of the same frames whatever the number of cores.
_H264_OPTIONS = ["-crf", "17", "-preset", "medium", "-threads", "4", "-movflags", "+faststart"]
_FFV1_OPTIONS = ["-level", "3", "-g", "1", "-slicecrc", "1"]


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Pictures in [0, 1] (float [frames, height, width, 3], as pipelines return them) as uint8, rounded.

    Raises:
        ValueError: the shape is wrong, or a value is NaN or infinite.
    """
    frames = np.asarray(frames)
    if frames.dtype == np.uint8:
        return check_video("frames", frames)
    if not np.isfinite(frames).all():
        raise ValueError("to_uint8: frames must be finite, but hold NaN or infinite values.")
    return check_video("frames", (frames.clip(0, 1) * 255).round().astype(np.uint8))


def check_video(name: str, video: np.ndarray) -> np.ndarray:
    """Return the video if it is uint8 [frames, height, width, 3] with at least one frame, else raise ValueError."""
    video = np.asarray(video)
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise ValueError(f"{name} must be uint8 [frames, height, width, 3], but is {video.dtype} {list(video.shape)}.")
    return video


def check_pair(reference: np.ndarray, video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both videos, checked to be of one shape."""
    reference, video = check_video("reference", reference), check_video("video", video)
    if reference.shape != video.shape:
        raise ValueError(
            f"reference and video must have one shape, but are {list(reference.shape)} and {list(video.shape)}."
        )
    return reference, video


@contextmanager
def whole_file(path: str | Path):
    """A temporary path in the same folder (with the same suffix) that becomes ``path`` when the block succeeds."""
    path = Path(path)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_video(path: str | Path, video: np.ndarray, fps: float) -> None:
    """Write a video as mp4 (H.264, yuv420p, constant quality), whole or not at all, never resized.

    Args:
        path: File to write; its folder must exist. A file already there is replaced at the end.
        video: uint8 [frames, height, width, 3]; height and width even, as yuv420p halves the colour planes.
        fps: Frames a second, above 0.

    Raises:
        ValueError: a wrong shape or dtype, odd sizes, or ``fps`` not above 0.
        OSError: the file cannot be written.
    """
    video = check_video("video", video)
    height, width = video.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"write_video: height and width must be even for H.264 yuv420p, but are {height} and {width}.")
    if not fps > 0:
        raise ValueError(f"write_video: fps must be above 0, but is {fps!r}.")
    _encode(path, video, fps, "libx264", "yuv420p", _H264_OPTIONS)


def write_lossless(path: str | Path, video: np.ndarray, fps: float) -> None:
    """Write a video as mkv (FFV1 in RGB), whole or not at all: :func:`read_video` gives back every bit.

    Arguments and errors as for :func:`write_video`; height and width may be odd.
    """
    video = check_video("video", video)
    if not fps > 0:
        raise ValueError(f"write_lossless: fps must be above 0, but is {fps!r}.")
    _encode(path, video, fps, "ffv1", "gbrp", _FFV1_OPTIONS)


def _encode(path: str | Path, video: np.ndarray, fps: float, codec: str, pixels: str, options: list[str]) -> None:
    with whole_file(path) as partial:
        writer = imageio.get_writer(
            partial,
            format="FFMPEG",
            fps=fps,
            codec=codec,
            quality=None,
            pixelformat=pixels,
            macro_block_size=1,  # never resize
            output_params=options,
            ffmpeg_log_level="error",
        )
        try:
            for frame in video:
                writer.append_data(frame)
        finally:
            writer.close()  # waits for ffmpeg; "with writer" would leave it writing after an error


def read_video(path: str | Path) -> np.ndarray:
    """Read a video file: uint8 [frames, height, width, 3].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a video that ffmpeg reads.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_video: there is no file {path}.")
    try:
        with imageio.get_reader(path, format="FFMPEG") as reader:
            frames = np.stack(list(reader.iter_data()))
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"read_video: {path} is not a readable video.") from error
    return check_video("video", frames)

"""mp4 files: what is written is what is read, never resized, whole or not at all."""

from __future__ import annotations

import os

import imageio.v2 as imageio
import numpy as np
import pytest

from psa_diffusers.metrics import psnr, read_video, write_video


def gradient(frames: int, height: int, width: int) -> np.ndarray:
    """A smooth picture that moves: what a codec keeps well."""
    x = np.linspace(0, 1, width)[None, None, :, None]
    y = np.linspace(0, 1, height)[None, :, None, None]
    t = np.linspace(0, 1, frames)[:, None, None, None]
    return (255 * np.concatenate(np.broadcast_arrays(x, y, (x + y + t) / 3), axis=-1)).astype(np.uint8)


@pytest.mark.parametrize("size", [(16, 16), (48, 64), (50, 34), (18, 22)])
def test_what_is_written_is_read_at_the_same_size(tmp_path, size):
    video = gradient(5, *size)
    write_video(tmp_path / "a.mp4", video, fps=8)
    back = read_video(tmp_path / "a.mp4")
    assert back.shape == video.shape
    assert psnr(video, back) > 30
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_the_file_is_h264_yuv420p_at_the_rate_asked_for(tmp_path):
    write_video(tmp_path / "a.mp4", gradient(9, 32, 32), fps=16)
    with imageio.get_reader(tmp_path / "a.mp4") as reader:
        facts = reader.get_meta_data()
    assert facts["codec"] == "h264"
    assert facts["pix_fmt"].startswith("yuv420p")
    assert facts["fps"] == 16


def test_the_same_frames_give_the_same_file(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, gradient(5, 32, 32), fps=8)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be kept to one core here")
def test_the_number_of_cores_does_not_change_the_file(tmp_path):
    cores = os.sched_getaffinity(0)
    try:
        for name, some in (("all.mp4", cores), ("one.mp4", {min(cores)})):
            os.sched_setaffinity(0, some)
            write_video(tmp_path / name, gradient(17, 64, 64), fps=8)
    finally:
        os.sched_setaffinity(0, cores)
    assert (tmp_path / "all.mp4").read_bytes() == (tmp_path / "one.mp4").read_bytes()


@pytest.mark.parametrize("size", [(17, 16), (16, 17)])
def test_odd_sizes_are_refused_not_resized(tmp_path, size):
    with pytest.raises(ValueError, match="even"):
        write_video(tmp_path / "a.mp4", gradient(2, *size), fps=8)
    assert not list(tmp_path.iterdir())


def test_a_rate_of_zero_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fps"):
        write_video(tmp_path / "a.mp4", gradient(2, 16, 16), fps=0)


def test_a_failure_half_way_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    write_video(path, gradient(2, 16, 16), fps=8)
    before = path.read_bytes()
    writer = type(imageio.get_writer(tmp_path / "probe.mp4", format="FFMPEG", fps=8))
    append, written = writer.append_data, []

    def stop_at_the_third(self, frame):
        written.append(frame)
        if len(written) == 3:
            (tmp_path / ".a.partial.mp4").touch()  # ffmpeg has it in memory yet; a longer video would be on disk
            raise KeyboardInterrupt
        append(self, frame)

    monkeypatch.setattr(writer, "append_data", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        write_video(path, gradient(5, 16, 16), fps=8)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_reading_what_is_no_video_or_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_video(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(ValueError, match="not a readable video"):
        read_video(tmp_path / "text.mp4")

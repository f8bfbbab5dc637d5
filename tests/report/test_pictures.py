"""Pictures hold what they say, and say what is missing where they cannot be drawn."""

import sys

import numpy as np
import pytest
import torch

from psa_diffusers.metrics import read_video
from psa_diffusers.report import notebook, pictures, plots
from psa_diffusers.report.block_mass import exact_mass, sampled_mass
from psa_diffusers.report.page.figures import plot_fidelity

from ..integration.tiny_wan import tiny_config

SMALL = tiny_config(num_levels=3, kv_block_size=8, compute_budget=0.4)
PNG = b"\x89PNG\r\n\x1a\n"


def texts(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_a_figure_shows_itself_and_leaves_pyplot_alone(call):
    figure = plots.plot_level_masks({"plan": call.plan(SMALL)})
    assert figure._repr_png_().startswith(PNG)
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_level_masks_are_the_plans(call):
    plan = call.plan(SMALL)
    figure = plots.plot_level_masks({"one": plan, "two": plan}, heads=[0, 1])
    assert texts(figure) == ["one, head 0", "one, head 1", "two, head 0", "two, head 1"]
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    for picture, head in zip(shown, (0, 1, 0, 1), strict=True):
        assert np.array_equal(picture, plan.level_mask[0, head])
    bars = [axes.patches for axes in figure.axes if axes.patches]
    assert len(bars) == 4 and all(sum(bar.get_width() for bar in row) == pytest.approx(1) for row in bars)
    assert [text.get_text() for text in figure.legends[0].texts] == ["full", "2x", "4x", "centroid", "skip"]


def test_level_masks_that_do_not_go_together(call):
    other = call.plan(tiny_config())
    with pytest.raises(ValueError, match="one num_levels"):
        plots.plot_level_masks({"three": call.plan(SMALL), "two": other})
    with pytest.raises(ValueError, match="heads"):
        plots.plot_level_masks({"three": call.plan(SMALL)}, heads=[])


def test_curves_and_mass(call):
    figure = plots.plot_trade_off({"a": [(0.3, 0.1), (0.1, 0.2)], "b": [(0.2, 0.1)]}, {"psa-3": (0.25, 0.12)})
    (axes,) = figure.axes
    assert axes.lines[0].get_xdata().tolist() == [0.1, 0.3] and axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.texts] == ["psa-3"]
    mass = plots.plot_mass({"exact": exact_mass(call, SMALL), "estimate": sampled_mass(call, SMALL)})
    assert texts(mass) == ["exact", "estimate"] and mass._repr_png_().startswith(PNG)


def test_the_pyramid_of_a_block(call):
    figure = pictures.plot_pyramid(call, SMALL, head=1, block=2)
    assert texts(figure) == ["full: 8 keys", "2x: 4 keys", "4x: 2 keys", "centroid: 1 key"]
    full, *pooled = (axes.images[0].get_array() for axes in figure.axes)
    order = call.plan(SMALL).order
    assert np.allclose(full, call.key[0, order[16:24], 1])
    for picture in pooled:
        assert np.allclose(picture, full.reshape(len(picture), -1, 12).mean(1), atol=1e-6)


def test_order_and_frames():
    order = torch.arange(2 * 4 * 4).flip(0)
    figure = pictures.plot_order((2, 4, 4), {"raster": None, "back": order}, block_size=8, blocks=[0, 3])
    shown = [axes.images[0].get_array() for axes in figure.axes]
    assert shown[0][:2].tolist() == [[1] * 4] * 2 and shown[1][2:].tolist() == [[2] * 4] * 2
    assert shown[2][:2].tolist() == [[2] * 4] * 2 and shown[3][2:].tolist() == [[1] * 4] * 2
    video = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    figure = pictures.plot_frames({"dense": video, "sparse": video}, count=3)
    assert texts(figure) == ["frame 0", "frame 4", "frame 8"]
    assert np.array_equal(figure.axes[4].images[0].get_array(), video[4])


def test_without_matplotlib_the_extra_is_named(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"psa-diffusers\[notebooks\]"):
        plots.plot_level_masks({"plan": call.plan(SMALL)})


def test_a_video_plays_inside_the_notebook(tmp_path):
    video = np.zeros((3, 16, 32, 3), np.uint8)
    shown = notebook.show_video(video, fps=8)
    assert "<video" in shown._repr_html_() and "base64" in shown._repr_html_()
    (tmp_path / "video.mp4").write_bytes(shown.data)
    assert read_video(tmp_path / "video.mp4").shape == video.shape


def test_tables():
    table = notebook.show_table([{"name": "a", "error": 0.12345, "count": 2}, {"name": "b", "error": 1.0, "count": 3}])
    assert table.data.splitlines() == [
        "| name | error | count |",
        "| --- | --: | --: |",
        "| a | 0.123 | 2 |",
        "| b | 1.000 | 3 |",
    ]


def test_settings_at_the_same_budget_lie_together():
    entries = [
        {
            "setting": name,
            "compute_budget_sparse": {"value": budget},
            "psnr": {"value": 30.0, "low": None, "high": None},
        }
        for name, budget in (("one", 0.14999), ("other", 0.15001))
    ]
    (axes,) = plot_fidelity(entries, "psnr", []).axes
    low, high = axes.get_xlim()
    assert high - low == pytest.approx(0.04) and low < 0.14999 and high > 0.15001

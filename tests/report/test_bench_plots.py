"""psa-bench's pictures, from rows like those it writes."""

import json

import pytest

from psa_diffusers.report.bench_plots import break_even, plot_benchmark
from psa_diffusers.report.figure import to_png


def row(tokens=8192, budget=0.15, dense=1.0, sparse=0.3, **changes):
    return {
        "device_name": "a GPU",
        "dtype": "bfloat16",
        "batch": 1,
        "heads": 12,
        "head_dim": 128,
        "rule": "budget",
        "query_block_size": 128,
        "kv_block_size": 64,
        "num_levels": 4,
        "torch": "2",
        "tokens": tokens,
        "text_tokens": 0,
        "compute_budget": budget,
        "achieved_budget": budget,
        "dense_median": dense,
        "dense_backend": "sdpa",
        **{f"sparse_{name}": sparse * factor for name, factor in (("median", 1), ("p20", 0.9), ("p80", 1.1))},
        "rivals": json.dumps({"sdpa": dense, "flex, binary mask": 0.5}),
        "rivals_budget": json.dumps({"flex, binary mask": budget}),
        **changes,
    }


def lines(axes):
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}


def test_both_panels_show_dense_sparse_and_ideal():
    rows = [row(4096, dense=0.4, sparse=0.6), row(8192), row(16384, dense=4.0, sparse=0.9), row(8192, 0.5, sparse=0.6)]
    figure = plot_benchmark(rows)
    lengths, budgets = figure.axes
    assert lines(lengths)["dense, sdpa"] == [(4096, 400.0), (8192, 1000.0), (16384, 4000.0)]
    assert [time for _, time in lines(lengths)["ideal: dense x budget"]] == pytest.approx([60.0, 150.0, 600.0])
    assert [time for _, time in lines(budgets)["ideal: dense x budget"]] == pytest.approx([150.0, 500.0])
    assert lines(budgets)["flex, binary mask"] == [(0.15, 500.0), (0.5, 500.0)]
    assert to_png(figure).startswith(b"\x89PNG")


def test_rows_of_other_calls_are_other_lines():
    rows = [row(4096), row(8192), row(16384, heads=4), row(32768, heads=4, device_name="another")]
    (axes,) = plot_benchmark(rows).axes
    assert [tokens for tokens, _ in lines(axes)["dense, sdpa"]] == [4096, 8192]


def test_a_row_measured_again_counts_the_last_time():
    (axes,) = plot_benchmark([row(4096, dense=9.0), row(8192), row(4096, dense=0.5)]).axes
    assert lines(axes)["dense, sdpa"] == [(4096, 500.0), (8192, 1000.0)]


@pytest.mark.parametrize("rows", [[], [row()], [row(), row(4096, 0.5)]])
def test_one_point_is_no_plot(rows):
    with pytest.raises(ValueError, match="two lengths at one budget"):
        plot_benchmark(rows)


def test_break_even():
    slower, even, faster = row(2048, dense=1, sparse=2), row(4096, dense=1, sparse=1), row(8192, dense=2, sparse=1)
    assert break_even([faster, slower]) == pytest.approx(4096)  # half way, both by a factor of two
    assert break_even([slower, even, faster]) == 4096
    assert break_even([faster]) == 8192
    assert break_even([slower]) is None and break_even([]) is None
    again = [row(16384, dense=1, sparse=2), row(65536, dense=4, sparse=2)]
    assert break_even([slower, faster, *again]) == pytest.approx(32768)  # slower twice: after the last time
    assert break_even([faster, slower, row(1024, dense=3, sparse=1)]) == pytest.approx(4096)  # from then on for good

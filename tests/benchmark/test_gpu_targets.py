"""The table of targets, from rows as psa-bench and the transformer's script write them."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_targets", ROOT / "scripts" / "gpu_targets.py")
    module, before = importlib.util.module_from_spec(spec), list(sys.path)
    sys.modules["gpu_targets"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    del sys.modules["gpu_targets"]


def row(tokens=75600, heads=40, budget=0.15, dense=0.2, sparse=0.05, **changes):
    stages = {"dense": dense, "pyramid_kernel": 0.002, "prices_kernel": 0.003, "covariance_kernel": 0.001}
    stages |= {"hopper_attention_kernel": 0.04, "rest": 0.001}
    given = {"naive psa, plan given": 5.5, "naive psa, plan and pyramid given": 4.5}
    return {
        **{"device": "cuda", "device_name": "a GPU", "torch": "2", "commit": "0123456789", "rule": "budget"},
        **{"tokens": str(tokens), "heads": str(heads), "head_dim": "128", "text_tokens": "0", "dtype": "bfloat16"},
        **{"compute_budget": str(budget), "dense_median": str(dense), "sparse_median": str(sparse)},
        **{"speedup": str(dense / sparse), "gpu_dense": str(dense), "gpu_sparse": str(0.9 * sparse)},
        **{"gpu_speedup": str(dense / sparse / 0.9), "dense_tflops": "500", "kernel_tflops": "400"},
        **{
            "dense_backend": "sdpa cudnn",
            "overhead_share": "0.035",
            "stages": json.dumps({name: {"median": taken} for name, taken in stages.items()}),
        },
        "rivals": json.dumps({"flex, binary mask": 0.3}),
        "speedups": json.dumps(
            {"flex, binary mask": 1.1, "official, whole": 4.0, "official, plan given": 3.0, **given}
        ),
        "rivals_error": json.dumps({"official, whole": 0.2}),
        "rivals_missing": "{}",
        **{"relative_error": "0.1", "peak_extra_over_kv": "0.6", "error_ratio": "1.3", "naive_level_1": "0.97"},
        **changes,
    }


def by_name(found):
    return {target.name.split(":")[0].split(",")[0]: target for target in found}


def test_figures_and_verdicts(script):
    rows = [row(), row(budget=0.25, sparse=0.1), row(budget=1.0)]
    rows += [row(2048, 12, dense=1.0, sparse=2.0), row(8192, 12, dense=2.0, sparse=1.0, peak_extra_over_kv="2.5")]
    transformer = {"model": "wan2.1-14b-720p", "share_of_ceiling": "0.9", "run_speedup": "1.6", "ceiling": "1.7"}
    found = script.targets(rows, [transformer | {"attention_share": "0.67"}])
    figures = [(target.figure, target.verdict) for target in found]
    assert figures == [
        (pytest.approx(4.0), "floor met"),
        (pytest.approx(2.0), "**missed**"),
        (pytest.approx(0.8), "floor met"),
        (pytest.approx(0.3 / (500 * 0.2 / 400)), "goal met"),
        (pytest.approx(0.025), "floor met"),  # pyramid and prices, not the value correction
        (4.0, "floor met"),
        (5.5, "floor met"),
        (pytest.approx(4096), "floor met"),
        (0.6, "goal met"),
        (0.9, "floor met"),
        (1.3, "floor met"),
    ]
    assert "2.50 at 8,192" in found[8].shown


def test_what_has_no_row_is_not_measured(script):
    found = script.targets([row(4096, 4, error_ratio="")], [])
    assert {target.verdict for target in found} == {"not measured"}
    missing = row(rivals_missing='{"official": "it broke"}', speedups="{}")
    assert by_name(script.targets([missing], []))["over the authors' full path at the same budget"].shown == "it broke"


def test_never_even_is_missed(script):
    rows = [row(tokens, 12, dense=1.0, sparse=2.0) for tokens in (2048, 8192)]
    (target,) = (t for t in script.targets(rows, []) if t.name.startswith("break-even"))
    assert target.verdict == "**missed**" and target.shown.startswith("above 8,192")


def test_page_keeps_what_is_around_the_table(script, tmp_path, capsys):
    rows, page = tmp_path / "rows.csv", tmp_path / "README.md"
    with rows.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row()))
        writer.writeheader()
        writer.writerow(row())
    page.write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n")
    assert script.main(["--rows", str(rows), "--readme", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "commit 0123456." in text and capsys.readouterr().out.strip() in text
    with pytest.raises(ValueError, match="lacks the markers"):
        script.replaced("nothing", "table")

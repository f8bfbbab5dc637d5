"""The script that runs diffusers' own tests with PSA enabled, on a checkout with one small test file."""

import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = """
import torch
from diffusers import WanTransformer3DModel


def model_class():
    return WanTransformer3DModel


def call(model):
    inputs = torch.ones(1, 4, 2, 8, 8), torch.tensor([1]), torch.ones(1, 8, 16)
    return model(*inputs, return_dict=False)[0]


def make():
    small = dict(in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=16, rope_max_seq_len=32)
    return model_class()(num_attention_heads=1, attention_head_dim=12, num_layers=2, **small)


@torch.no_grad()
def test_inference():
    assert call(make()).shape == (1, 4, 2, 8, 8)


def test_training():
    call(make()).sum().backward()


def test_that_only_native_attention_passes():
    assert type(make().blocks[0].attn1.processor).__name__ == "WanAttnProcessor"
"""


def test_outcomes_are_compared_and_calls_counted(tmp_path):
    folder = tmp_path / "tests" / "models" / "transformers"
    folder.mkdir(parents=True)
    (folder / "test_models_transformer_small.py").write_text(TESTS)
    (folder / "test_models_transformer_image.py").write_text("assert False\n")  # no model that PSA knows: not run
    # A checkout's tests take its own diffusers, unless the environment's is there before them.
    (tmp_path / "src" / "diffusers").mkdir(parents=True)
    (tmp_path / "src" / "diffusers" / "__init__.py").write_text("raise ImportError('of the checkout')")
    (tmp_path / "tests" / "conftest.py").write_text(f"import sys\nsys.path.insert(1, {str(tmp_path / 'src')!r})\n")
    command = [sys.executable, ROOT / "scripts" / "diffusers_tests" / "run.py", tmp_path, "--csv", tmp_path / "out.csv"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "only natively" in done.stdout, done.stderr
    (row,) = csv.DictReader((tmp_path / "out.csv").read_text().splitlines())
    assert (row["native_passed"], row["psa_passed"], row["passed_natively_only"]) == ("3", "2", "1")
    assert (row["sparse_calls"], row["tests_with_sparse_calls"]) == ("2", "1")
    assert row["dense_reasons"] == "gradients needed: 2"
    assert row["tests_commit"] == ""  # it is no checkout


def test_a_file_that_cannot_be_collected_is_no_result(tmp_path):
    folder = tmp_path / "tests" / "models" / "transformers"
    folder.mkdir(parents=True)
    (folder / "test_models_transformer_small.py").write_text(TESTS + "\nraise ImportError\n")
    command = [sys.executable, ROOT / "scripts" / "diffusers_tests" / "run.py", tmp_path, "--csv", tmp_path / "out.csv"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "did not run" in done.stderr
    assert not (tmp_path / "out.csv").exists()

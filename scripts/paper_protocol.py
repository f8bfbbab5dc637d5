"""The paper's protocol as one command: PSNR, SSIM, LPIPS against dense attention, the first quarter of the steps dense.

Runs psa-compare with the methods and sizes of ``configs/protocols/paper.yaml``; every other option goes to psa-compare,
and one that is given wins. LPIPS needs ``--lpips-weights`` (see the README).

Example: python scripts/paper_protocol.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --output outputs/paper
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from psa_diffusers import PSAConfig
from psa_diffusers.cli.compare import app
from psa_diffusers.cli.errors import run_command

PROTOCOL = Path(__file__).resolve().parents[1] / "configs" / "protocols" / "paper.yaml"


def arguments(given: Sequence[str]) -> list[str]:
    """The arguments of psa-compare.

    Raises:
        SystemExit: a method's share of dense steps is not the protocol's.
    """
    protocol = yaml.safe_load(PROTOCOL.read_text(encoding="utf-8"))
    for name in protocol["presets"]:
        share = PSAConfig.preset(name).dense_warmup
        if share != protocol["dense_warmup"]:
            raise SystemExit(f"{name} has dense_warmup {share}, the protocol {protocol['dense_warmup']}.")
    model = given[given.index("--model") + 1] if "--model" in given[:-1] else None
    defaults = {"preset": ",".join(protocol["presets"]), **protocol["models"].get(model, {})}
    missing = {name: value for name, value in defaults.items() if f"--{name}" not in given}
    return [*given, *(str(part) for name, value in missing.items() for part in (f"--{name}", value))]


if __name__ == "__main__":
    if "--help" in sys.argv[1:]:
        print(__doc__)
    sys.exit(run_command("psa-compare", app, arguments(sys.argv[1:])))

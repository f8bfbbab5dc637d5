"""Makes the laboratory's modules importable: ``import _laboratory`` comes before them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "laboratory"))

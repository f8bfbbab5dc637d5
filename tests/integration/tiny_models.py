"""Tiny random transformers of every family, one table: how to build and to call each, and what PSA should find."""

from .tiny_alone import ALONE
from .tiny_joint import JOINT

TINY = {**JOINT, **ALONE}

"""Tiny random transformers of every family, one table: how to build and to call each, and what PSA should find."""

from .tiny_alone import ALONE
from .tiny_hunyuan import HUNYUAN_LIKE
from .tiny_joint import JOINT

TINY = {**HUNYUAN_LIKE, **JOINT, **ALONE}

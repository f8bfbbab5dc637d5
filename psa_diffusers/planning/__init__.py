"""What each query block reads, and how finely."""

from .build import build_plan
from .plan import Plan

__all__ = ["Plan", "build_plan"]

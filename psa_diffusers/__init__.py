"""Pyramid Sparse Attention for Hugging Face Diffusers video pipelines."""

from .config import PSAConfig

__version__ = "0.1.0"

__all__ = ["PSAConfig"]

"""What knows diffusers: the attention processor, its schedule, and the ways to install and remove it."""

from .install import disable_psa, enable_psa, psa_statistics
from .processor import PSAProcessor
from .statistics import PSAStatistics

__all__ = ["PSAProcessor", "PSAStatistics", "disable_psa", "enable_psa", "psa_statistics"]

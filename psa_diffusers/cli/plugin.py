"""The only place where the commands touch the plugin."""

from __future__ import annotations

from typing import Any

from ..config import PSAConfig
from .errors import as_wrong_usage


def switch_on(pipe: Any, config: PSAConfig, calibrate: bool = False) -> None:
    """Enable PSA with fresh statistics.

    Raises:
        WrongUsageError: the settings are not for this model.
    """
    from .. import disable_psa, enable_psa

    disable_psa(pipe)
    with as_wrong_usage(ValueError):
        enable_psa(pipe, config, calibrate=calibrate)


def switch_off(pipe: Any) -> None:
    """Back to native attention."""
    from .. import disable_psa

    disable_psa(pipe)


def statistics(pipe: Any) -> Any:
    """What the last run with PSA did."""
    from ..integration import psa_statistics

    return psa_statistics(pipe)

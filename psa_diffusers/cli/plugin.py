"""The only place where the commands touch the plugin."""

from __future__ import annotations

from typing import Any

from ..config import PSAConfig


def switch_on(pipe: Any, config: PSAConfig, calibrate: bool = False) -> None:
    """Enable PSA with fresh statistics."""
    from .. import disable_psa, enable_psa

    disable_psa(pipe)
    enable_psa(pipe, config, calibrate=calibrate)


def switch_off(pipe: Any) -> None:
    """Back to native attention."""
    from .. import disable_psa

    disable_psa(pipe)


def statistics(pipe: Any) -> Any:
    """What the last run with PSA did."""
    from ..integration import psa_statistics

    return psa_statistics(pipe)

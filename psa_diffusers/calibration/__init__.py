"""Which compute budget each call of a run deserves: measured errors, and what makes the least of them."""

from .allocation import ErrorCurve, spend_budget, spend_to_error
from .probe import Probe, can_probe, candidate_budgets, probe_call

__all__ = ["ErrorCurve", "Probe", "can_probe", "candidate_budgets", "probe_call", "spend_budget", "spend_to_error"]

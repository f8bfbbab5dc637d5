"""The ``budget`` rule's planner as fused GPU kernels (Triton 3.4 and newer); on CPUs under ``TRITON_INTERPRET=1``.

One file a stage: :mod:`.statistics` (blocks of keys and values), :mod:`.centroids`, :mod:`.masses` and :mod:`.shares`
(two estimates of attention^2; long videos on Hopper take :mod:`.hopper_centroids` and :mod:`.hopper_masses`),
:mod:`.prices` (errors, and what it is worth to lessen them), :mod:`.spending` (levels); run by :mod:`.planner`. What
they compute is defined by the torch code one folder up.
"""

from .planner import plan_levels, why_unsupported

__all__ = ["plan_levels", "why_unsupported"]

"""The planner as fused GPU kernels (Triton 3.4 and newer); on CPUs under ``TRITON_INTERPRET=1``.

One file a stage. How much attention blocks get, by the config's importance (:mod:`.sources`): :mod:`.key_samples` and
:mod:`.masses`, :mod:`.means`, or :mod:`.strided_masses`. By the rules of the paper levels follow row by row:
:mod:`.cuts` and :mod:`.ranks`, run by :mod:`.ranked`. The ``budget`` rule joins :mod:`.statistics` (blocks of keys and
values) and :mod:`.centroids` (a second estimate) in :mod:`.shares` (attention^2), :mod:`.prices` (errors, and what it
is worth to lessen them) and :mod:`.spending` (levels), run by :mod:`.planner`. :mod:`.similarity` caps the levels of
either. Long videos on Hopper take :mod:`.hopper_centroids` and :mod:`.hopper_masses`. What all these compute is defined
by the torch code one folder up.
"""

from .planner import plan_levels, why_unsupported

__all__ = ["plan_levels", "why_unsupported"]

"""Experiment 7: the order of the tokens in blocks: raster, Gilbert curve, tiles of 4 x 4 x 4 and 1 x 8 x 8.

python scripts/experiments/token_order.py --captures runs/captures --every 3
"""

import _laboratory  # noqa: F401
from block_policies import PRESETS, Result, budget_rule, quantiles
from cases import Case
from experiment import run
from policies import BINARY
from static_policies import tile_order

from psa_diffusers import PSAConfig
from psa_diffusers.planning.ordering import gilbert_order

ORDERS = {
    "raster": None,
    "gilbert": gilbert_order,
    "tiles 4 x 4 x 4": lambda grid: tile_order(grid, (4, 4, 4)),
    "tiles 1 x 8 x 8": lambda grid: tile_order(grid, (1, 8, 8)),
}
RASTER = PSAConfig(order="raster")
KINDS = {
    "binary": quantiles(BINARY, PSAConfig(order="raster", importance_reduction="max")),
    "PSA-3": quantiles(PRESETS["PSA-3"], PSAConfig(order="raster", importance_reduction="max")),
    "ours": budget_rule(RASTER),
}


def reordered(policy, order_of):
    """The policy on tokens that were put in another order before; its own order is none."""

    def ordered(case: Case, budget: float) -> Result:
        order = order_of(case.grid).to(case.query.device)
        tensors = (x[:, order] for x in case.inputs)
        found = policy(Case(case.name, case.source, *tensors, case.grid), budget)
        return Result(found.output[:, order.argsort()], found.costs, found.estimator)

    return ordered


POLICIES = {
    f"{kind}, {name}": policy if order is None else reordered(policy, order)
    for kind, policy in KINDS.items()
    for name, order in ORDERS.items()
}

if __name__ == "__main__":
    run("token_order", __doc__, POLICIES, (0.15,))

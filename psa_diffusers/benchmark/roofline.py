"""The least time that each stage can take on a GPU: its operations and bytes against the GPU's limits.

What is counted is the work that the method asks for, each input read once and each result written once, half precision;
not what a kernel happens to do. A kernel that takes twice its least time does, or waits for, as much again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..backends.logit_variance import QUERY_STRIDE
from ..config import PSAConfig

HALF, SINGLE = 2, 4  # bytes of a number


@dataclass(frozen=True)
class Gpu:
    """Limits of one GPU, a second."""

    matrix_flops: float  # half precision, dense
    bytes: float  # of memory
    exponentials: float  # of the special function units


# NVIDIA's data sheets (H100 SXM, H200 SXM). Exponentials: 16 a clock and processor (CUDA C++ programming guide,
# arithmetic instructions, compute capability 9.0), 132 processors at the 1.83 GHz that 989 TFLOP/s are stated for.
EXPONENTIALS_90 = 16 * 132 * 1.83e9
GPUS = {
    "NVIDIA H100 80GB HBM3": Gpu(989.4e12, 3.35e12, EXPONENTIALS_90),
    "NVIDIA H200": Gpu(989.4e12, 4.8e12, EXPONENTIALS_90),
}


@dataclass(frozen=True)
class Work:
    """What one stage must do at least."""

    flops: float = 0.0  # of matrix products: two a multiplication and addition
    bytes: float = 0.0
    exponentials: float = 0.0

    def seconds(self, gpu: Gpu) -> dict[str, float]:
        """The least seconds by each limit."""
        return {
            "matrix products": self.flops / gpu.matrix_flops,
            "memory": self.bytes / gpu.bytes,
            "exponentials": self.exponentials / gpu.exponentials,
        }


@dataclass(frozen=True)
class Call:
    """Sizes of one self-attention call, one sample."""

    tokens: int
    heads: int
    head_dim: int
    compute_budget: float
    config: PSAConfig = field(default_factory=PSAConfig)

    @property
    def query_blocks(self) -> int:
        return -(-self.tokens // self.config.query_block_size)

    @property
    def kv_blocks(self) -> int:
        return -(-self.tokens // self.config.kv_block_size)

    @property
    def pairs(self) -> int:
        return self.heads * self.query_blocks * self.kv_blocks

    @property
    def tensor_bytes(self) -> int:
        """Of queries, of keys, of values or of the output."""
        return HALF * self.tokens * self.heads * self.head_dim

    @property
    def rows_per_token(self) -> float:
        """Rows of the pyramid, the centroids among them: 1.89 with 4 levels and blocks of 64."""
        levels = sum(2.0**-level for level in range(self.config.num_levels))
        return levels + 1 / self.config.kv_block_size


def dense_work(call: Call) -> Work:
    """Dense attention."""
    logits = call.heads * call.tokens**2
    return Work(4 * logits * call.head_dim, 4 * call.tensor_bytes, logits)


def stage_works(call: Call) -> dict[str, Work]:
    """By the name of the kernel that does it. The correction's last step and the launch order are next to nothing."""
    config, pairs, width = call.config, call.pairs, call.head_dim
    levels, kv = config.num_levels, 2 * call.tensor_bytes  # keys and values
    block_row = call.heads * call.kv_blocks * width  # numbers: one row of each kv block
    drawn = config.sampled_queries * call.heads * call.query_blocks  # sampled queries of either estimate
    masses = drawn * call.kv_blocks
    averages = call.heads * call.query_blocks * width  # numbers: one row of each query block
    attention = call.compute_budget * call.heads * call.tokens**2  # logits
    return {
        # Means of keys and values, the keys' spread at each level, and the sampled keys.
        "statistics_kernel": Work(bytes=kv + HALF * block_row * (2 + levels + config.sampled_keys)),
        # Every query sampled for the second estimate with every centroid, and with the spread around it.
        "centroids_kernel": Work(
            flops=2 * 2 * drawn * call.kv_blocks * width,
            bytes=HALF * (drawn * width + 2 * block_row + averages) + SINGLE * pairs,
            exponentials=drawn * call.kv_blocks,
        ),
        "masses_kernel": Work(
            flops=2 * masses * config.sampled_keys * width,
            bytes=HALF * (drawn * width + config.sampled_keys * block_row + masses),
            exponentials=masses * config.sampled_keys,
        ),
        "shares_kernel": Work(
            flops=2 * pairs * width, bytes=HALF * (masses + block_row + averages) + 2 * SINGLE * pairs
        ),
        # A product for each level's keys and one for the values; a price of 16 bits for each level.
        "prices_kernel": Work(
            flops=2 * (levels + 1) * pairs * width,
            bytes=SINGLE * pairs + HALF * (2 * averages + (levels + 1) * block_row + levels * pairs),
        ),
        "bins_kernel": Work(bytes=HALF * levels * pairs),
        "levels_kernel": Work(bytes=HALF * levels * pairs + pairs),
        "read_lists_kernel": Work(bytes=pairs + HALF * pairs),
        "pyramid_kernel": Work(bytes=kv + call.rows_per_token * kv),
        # Pairs of rows of each level, and the coarsest rows with their centroids: products of a column with a row.
        "covariance_kernel": Work(flops=2 * call.tokens * call.heads * width**2, bytes=call.rows_per_token * kv),
        "query_power_kernel": Work(bytes=call.tensor_bytes / QUERY_STRIDE),
        # Every key once, and the bias of every row of the pyramid.
        "logit_variance_kernel": Work(
            bytes=call.tensor_bytes + SINGLE * call.rows_per_token * call.tokens * call.heads
        ),
        "hopper_attention_kernel": Work(
            flops=4 * attention * width,
            bytes=kv + call.rows_per_token * kv + HALF * pairs,  # queries, output; pyramid; lists
            exponentials=attention,
        ),
    }


def roofline_rows(
    call: Call, gpu_name: str, measured: Mapping[str, float | Mapping[str, float]]
) -> list[dict[str, object]]:
    """One row a stage that was measured or counted.

    Args:
        gpu_name: One of ``GPUS``.
        measured: Seconds by stage, or quantiles of them, as :func:`.stages.measure_stages` gives; ``dense`` among them.

    Raises:
        ValueError: nothing is known of this GPU.
    """
    if gpu_name not in GPUS:
        raise ValueError(f"no limits are known of {gpu_name!r}; they are of {', '.join(GPUS)}.")
    gpu, works = GPUS[gpu_name], {"dense": dense_work(call), **stage_works(call)}
    seconds = {name: taken["median"] if isinstance(taken, Mapping) else taken for name, taken in measured.items()}
    for name in seconds:  # a kernel for Hopper has its stage's work
        if name not in works and (stage := name.removeprefix("hopper_")) in works:
            works[name] = works.pop(stage)
    rows = []
    for name in [*works, *(name for name in seconds if name not in works)]:
        row = {"stage": name, "measured_ms": 1e3 * seconds[name] if name in seconds else None}
        if name in works:
            row |= _limits(works[name], gpu, seconds.get(name))
        rows.append(row)
    return rows


def _limits(work: Work, gpu: Gpu, taken: float | None) -> dict[str, object]:
    least = work.seconds(gpu)
    bound = max(least, key=least.__getitem__)
    return {
        "gflop": work.flops / 1e9,
        "gigabytes": work.bytes / 1e9,
        "giga_exponentials": work.exponentials / 1e9,
        **{f"least_ms, {name}": 1e3 * seconds for name, seconds in least.items()},
        "bound_by": bound,
        "least_ms": 1e3 * least[bound],
        "share_of_limit": least[bound] / taken if taken else None,
    }

"""The records that travel between the stages: frozen pytree dataclasses (letters: `shapes.py`).

Each states its invariants; none has behaviour beyond read-only views. `Site` is made by
`sites`, `Plan` by `plan`; these four sit between them.
"""

import jax
import numpy as np
from flax import struct

# On the host NumPy's, in float64 where a solver needs it; on the device jax's.
Array = jax.Array | np.ndarray


@struct.dataclass
class Statistics:
    """Reductions of one streamed pass of the float denoiser over the calibration set.

    Every Gram is of *centred* features (centred in float32 before the product); the raw one is
    recovered from `row_sums`: K_raw = K + r 1' + 1 r' + c with c = sum(row_sums) / N^2 and
    r = row_sums / N - c. `input_min <= 0 <= input_max` always.
    """

    timesteps: Array  # int32 [T], descending
    gram: Array  # float32 [T,L,N,N], one timestep at a time
    row_sums: Array  # float32 [T,L,N], row sums of the raw (uncentred) Gram
    pooled_gram: Array  # float32 [L,N,N], rows drawn over all (t, label) pairs
    pooled_row_sums: Array  # float32 [L,N]
    time_only: Array  # bool [L], the output does not change when x_t does
    input_min: Array  # float32 [T,L,2], operands (lhs, rhs); 0 where an operand is a weight
    input_max: Array  # float32 [T,L,2]
    output_error: Array | None = None  # float32 [T,L,K], relative error of the site's output


@struct.dataclass
class Scores:
    """How much each site matters, by timestep: `value` [T,L] or [T,L,K].

    `kind="redundancy"`: a large value says that the site needs few bits (mean orthogonality
    metric). `kind="damage"`: expected loss of each choice, [T,L,K], never rising with bits.
    """

    value: Array
    kind: str = struct.field(pytree_node=False)
    name: str = struct.field(pytree_node=False)
    matrix: Array | None = None  # [T,L,L] the site-by-site metric, where the score has one


@struct.dataclass
class Problem:
    """Multiple-choice knapsack: pick one choice per site, least total value under the budgets.

    `legal` has at least one True per row (a pin leaves exactly one). Sites of equal `tie` must
    take the same choice. `resources` exclude what no choice changes; that is in `fixed`, and a
    choice is within budget when sum_l resources[r,l,choice_l] + fixed[r] <= budgets[r].
    """

    value: Array  # float64 [L,K], expected damage
    resources: Array  # float64 [R,L,K]
    fixed: Array  # float64 [R]
    budgets: Array  # float64 [R]
    w_bits: Array  # int32 [K], ascending
    a_bits: Array  # int32 [K]
    legal: Array  # bool [L,K]
    tie: Array  # int32 [L]
    parameters: Array  # int64 [L], weights per site (size_only ranks by it)


@struct.dataclass
class Allocation:
    """A solver's answer. `bound <= objective`; `gap = objective - bound`; feasible whenever
    `status` is "optimal" or "rounded"."""

    choice: Array  # int32 [L], index into w_bits
    objective: float
    bound: float
    gap: float
    status: str = struct.field(pytree_node=False)
    fractional: Array | None = None  # float64 [L], mean bits at the LP vertex

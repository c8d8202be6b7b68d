"""The records that travel between the stages: frozen pytree dataclasses (letters: `shapes.py`).

Each states its invariants; none has behaviour beyond read-only views. `Site` is made by
`sites`, `Plan` by `plan`; these four sit between them.
"""

import enum

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
    # Entries of a damage score that were measured above that of a narrower choice, and lowered.
    violations: int = struct.field(pytree_node=False, default=0)


# The width of an operand that stays in float32, wherever widths are integers.
FLOAT_BITS = 32


@struct.dataclass
class Problem:
    """Multiple-choice knapsack: pick one choice per site, least total value under R budgets.

    A choice is a pair (w_bits, a_bits), in ascending order; FLOAT_BITS twice is "keep the site in
    float". `legal` has at least one True per row (a pin leaves exactly one). Sites of equal `tie`
    must take the same choice. `resources` exclude what no choice changes; that is in `fixed`, and
    choices are within budget when sum_l resources[r,l,choice_l] + fixed[r] <= budgets[r] for all r.
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
    names: tuple[str, ...] = struct.field(pytree_node=False, default=())  # of the R resources


class Status(enum.Enum):
    """How a solver ended. The value is advice, to be shown with the allocation's numbers."""

    OPTIMAL = "optimal: no allocation within the budgets is better"
    ROUNDED = "within `gap` of the best; exact=True looks for what closes it"
    NODE_LIMIT = "stopped at the node limit, within `gap` of the best; raise node_limit"
    ITERATION_LIMIT = (
        "the interior point stopped at its iteration cap: `bound` holds, but may be loose; look "
        "for costs of very different size"
    )
    UNDECIDED = (
        "the relaxation fits the budgets, but no allocation was found that does: exact=True "
        "decides, or raise a budget a little"
    )
    INFEASIBLE = (
        "no allocation fits the budgets: `nearest` holds for each resource the least budget that "
        "fits with the others as they are (inf: none does); raise one to it, allow narrower "
        "choices or pin fewer sites"
    )

    @property
    def feasible(self) -> bool:
        """Whether the allocation is within the budgets."""
        return self not in (Status.UNDECIDED, Status.INFEASIBLE)


@struct.dataclass
class Allocation:
    """A solver's answer. `bound <= objective`; `gap = objective - bound`, absolute.

    Within the budgets where `status.feasible`; otherwise `choice` is the nearest that was found,
    and objective and gap are infinite.
    """

    choice: Array  # int32 [L], index into the problem's choices
    objective: float
    bound: float  # no allocation has a smaller value
    gap: float
    status: Status = struct.field(pytree_node=False)
    fractional: Array | None = None  # float64 [L], mean w_bits at the LP vertex
    # float64 [R], the LP's duals: damage that one more unit of each budget would save, >= 0.
    price: Array | None = None
    nearest: Array | None = None  # float64 [R], where INFEASIBLE

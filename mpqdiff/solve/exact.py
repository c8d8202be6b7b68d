"""The best allocation, proven: branch and bound over the LP.

At the root, and at every node, a choice goes where its reduced cost lifts the bound to the best
value known (Nauss 1978): what is left is small. The node of least bound is split at the site that
its vertex divides most evenly, its choices into those below and above the mean priced cost of the
vertex, so that both halves exclude the vertex. Nodes are solved and rounded in batches by
`relaxation.relax_many`.
"""

import heapq
from typing import NamedTuple

import numpy as np

from mpqdiff.records import Array
from mpqdiff.solve import barrier
from mpqdiff.solve.feasible import Rows, fits, spent
from mpqdiff.solve.relaxation import Relaxed, Scaled, relax_many, scale

CLOSED = 1e-9  # relative gap that counts as none
BATCH = 8  # nodes split at once, two children each


class Found(NamedTuple):
    """The end of a search."""

    choice: np.ndarray | None  # int32 [L], None where none that fits was found
    objective: float  # inf where none
    bound: float  # of every allocation that fits; inf where there is none
    complete: bool  # the search ended before the node limit
    nodes: int


class _Node(NamedTuple):
    bound: float
    legal: np.ndarray  # bool [K,L]
    price: np.ndarray  # scaled
    key: Array  # the vertex: see `vertex.Vertex`
    site: Array
    pick: Array
    amount: Array


class _Search:
    """The nodes of one table, its best choice, and the least bound among what was discarded."""

    def __init__(self, table: Rows, budgets, choice, objective: float):
        self.table, self.budgets = table, np.asarray(budgets, np.float64)
        self.scaled: Scaled = scale(table)
        self.choice, self.objective = choice, objective
        self.floor = np.inf
        self.nodes = 0
        self.open: list[tuple[float, int, _Node]] = []

    def cutoff(self) -> float:
        """What a bound must stay below to be of interest."""
        if not np.isfinite(self.objective):
            return np.inf
        return self.objective - 0.5 * CLOSED * abs(self.objective)

    def _offer(self, choice: Array) -> None:
        objective = float(spent(self.table.value, choice))
        if objective < self.objective and fits(self.table, choice):
            self.choice, self.objective = choice, objective

    def solve(self, legal: np.ndarray) -> None:
        """Bound, round and keep the nodes `legal` [N,K,L]."""
        scaled, count = self.scaled, len(legal)
        self.nodes += count
        cutoff = (self.cutoff() - scaled.value_base[0]) / scaled.value_unit[0]
        cutoff = min(cutoff, scaled.greatest[0] * (1 + 1e-9) + 1e-9)
        out = relax_many(
            scaled,
            np.broadcast_to(self.table.limit, (count, len(self.table.limit))),
            np.broadcast_to(self.budgets, (count, len(self.budgets))),
            legal=legal,
            cutoff=np.full(count, cutoff),
        )
        for lane in range(count):
            self._keep(legal[lane], out, lane)

    def _keep(self, legal: np.ndarray, out: Relaxed, lane: int) -> None:
        scaled = self.scaled
        unit, base = scaled.value_unit[0], scaled.value_base[0]
        if (self.table.limit < scaled.cost_base).any() or (
            out.cut[lane] and out.bound[lane] > scaled.greatest[0] * (1 + 1e-9) + 1e-9
        ):
            return  # no allocation fits
        bound = base + unit * float(out.bound[lane])
        self._offer(out.choice[lane][: scaled.sites])
        if out.cut[lane]:
            self.floor = min(self.floor, bound)
            return
        if legal[:, : scaled.sites].sum(axis=0).max() == 1:
            return  # a single choice, offered above if it is within the limits
        price = np.where(out.price[lane] > 0, out.price[lane], 0.0)
        reduced = barrier.reduced_costs(scaled.value[0], scaled.cost, price)
        reduced = np.where(legal, reduced, np.inf)
        lifted = bound + unit * (reduced - reduced.min(axis=0))
        gone = legal & (lifted >= self.cutoff())
        self.floor = min(self.floor, lifted[gone].min(initial=np.inf))
        at = (out.key, out.site, out.pick, out.amount)
        node = _Node(bound, legal & ~gone, price, *(array[lane] for array in at))
        if node.legal.any(axis=0).all():
            heapq.heappush(self.open, (bound, self.nodes + lane, node))

    def next_nodes(self) -> list[_Node]:
        """The nodes of least bound, up to a batch; those above the cutoff are dropped."""
        nodes: list[_Node] = []
        while self.open and len(nodes) < BATCH:
            node = heapq.heappop(self.open)[2]
            if node.bound < self.cutoff():
                nodes.append(node)
            else:
                self.floor = min(self.floor, node.bound)
        return nodes


def _halves(node: _Node, scaled: Scaled) -> list[np.ndarray]:
    """Two sets of legal choices that partition those of `node`, each without its vertex."""
    sites = node.legal.shape[1]
    split = (node.site < sites) & (node.amount > 1e-9) & (node.amount < 1 - 1e-9)
    site_of = np.minimum(node.site, sites - 1)
    key_of = node.key[site_of]
    split &= node.legal[node.pick, site_of] & node.legal[key_of, site_of]
    weight = node.price if (node.price > 0).any() else np.ones_like(node.price)
    priced = np.einsum("r,rkl->kl", weight, scaled.cost)
    if split.any():
        slot = int(np.argmax(np.where(split, np.minimum(node.amount, 1 - node.amount), -1.0)))
        site, pick, key = int(site_of[slot]), int(node.pick[slot]), int(key_of[slot])
        low = priced[:, site] <= (priced[pick, site] + priced[key, site]) / 2
        if low[pick] == low[key]:
            low = np.arange(len(low)) == pick
    else:  # the vertex is integral, and exceeds a limit by rounding: any site divides it
        site = int(np.argmax(node.legal.sum(axis=0)))
        low = np.arange(node.legal.shape[0]) == node.legal[:, site].argmax()
    halves = []
    for side in (low, ~low):
        legal = node.legal.copy()
        legal[:, site] &= side
        halves.append(legal)
    return halves


def _reduce(search: _Search, node: _Node) -> tuple[Rows, np.ndarray, np.ndarray]:
    """The table over the sites that `node` leaves a choice, those sites, and a full choice [L]."""
    table, count = search.table, search.scaled.sites
    legal = node.legal[:, :count].T
    free = np.flatnonzero(legal.sum(axis=1) > 1)
    settled = legal.argmax(axis=1).astype(np.int32)
    fixed = np.setdiff1d(np.arange(count), free)
    limit = table.limit - spent(table.cost[:, fixed], settled[fixed])
    return Rows(table.value[free], table.cost[:, free], legal[free], limit), free, settled


def search(
    table: Rows, budgets, *, choice=None, objective: float = np.inf, node_limit: int = 10_000
) -> Found:
    """The best choice for `table`, from one of known `objective` if any.

    `budgets` [R] are the limits before fixed costs, the scale of rounding. Ends when the bound is
    within CLOSED of the objective, or after `node_limit` LPs.
    """
    root = _Search(table, budgets, choice, objective)
    root.solve((root.scaled.value[0] < barrier.BIG)[None])
    nodes = root.next_nodes()
    if not nodes:
        return _found(root, root.choice, 0.0)
    reduced, free, settled = _reduce(root, nodes[0])
    if not len(free):
        root._offer(settled)
        return _found(root, root.choice, 0.0)
    rest = float(spent(np.delete(table.value, free, axis=0), np.delete(settled, free)))
    inner = _Search(reduced, root.budgets, None, root.objective - rest)
    inner.floor, inner.nodes = root.floor - rest, root.nodes
    inner.solve((inner.scaled.value[0] < barrier.BIG)[None])
    while inner.nodes < node_limit and (batch := inner.next_nodes()):
        halves = [half for node in batch for half in _halves(node, inner.scaled)]
        inner.solve(np.stack(halves))
    best = root.choice
    if inner.choice is not None:
        best = settled.copy()
        best[free] = inner.choice
    return _found(inner, best, rest)


def _found(search: _Search, choice, rest: float) -> Found:
    nodes = [node for _, _, node in search.open if node.bound < search.cutoff()]
    bound = min([search.floor, search.objective, *(node.bound for node in nodes)])
    return Found(choice, search.objective + rest, bound + rest, not nodes, search.nodes)

"""Why a site has its widths: duality against HiGHS, and what the verdicts say."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import linprog

from mpqdiff import solve
from mpqdiff.errors import InputError
from mpqdiff.explain import explain, text
from mpqdiff.records import Allocation, Problem, Status
from mpqdiff.sites import Site

BITS = (2, 4, 8)


def site(path, pin=None, kind="dense"):
    return Site(path, kind, (8, 8), 64, 0, 64, path, pin)


def make(value, cost, budgets, *, w_bits=BITS, a_bits=None, legal=None, tie=None, names=("bytes",)):
    """value [L,K], cost [R,L,K]."""
    value = np.asarray(value, np.float64)
    return Problem(
        value=value,
        resources=np.asarray(cost, np.float64),
        fixed=np.zeros(len(budgets)),
        budgets=np.asarray(budgets, np.float64),
        w_bits=np.asarray(w_bits, np.int32),
        a_bits=np.asarray(a_bits or [8] * value.shape[1], np.int32),
        legal=np.ones(value.shape, bool) if legal is None else np.asarray(legal),
        tie=np.arange(len(value), dtype=np.int32) if tie is None else np.asarray(tie, np.int32),
        parameters=np.full(len(value), 64),
        names=names,
    )


def allocate(choice, **fields):
    return Allocation(
        np.asarray(choice, np.int32), 1.0, 1.0, 0.0, Status.OPTIMAL,
        **{name: np.asarray(value, np.float64) for name, value in fields.items()},
    )  # fmt: skip


def random_problem(seed, resources):
    """Damage that falls and costs that rise with bits, ties among some sites, a few illegal."""
    rng = np.random.default_rng(seed)
    value = np.sort(rng.gamma(0.5, size=(30, 5)), axis=1)[:, ::-1]
    cost = np.sort(rng.uniform(1, 9, (resources, 30, 5)), axis=2)
    legal = rng.uniform(size=(30, 5)) < 0.9
    legal[np.arange(30), rng.integers(0, 5, 30)] = True
    low = np.where(legal, cost, np.inf).min(axis=2).sum(axis=1)
    high = np.where(legal, cost, -np.inf).max(axis=2).sum(axis=1)
    names = ("bytes", "seconds")[:resources]
    return make(value, cost, low + 0.4 * (high - low), w_bits=(2, 3, 4, 6, 8), legal=legal,
                names=names)  # fmt: skip


def highs(problem):
    """(shares [L,K] at HiGHS's vertex, prices [R])."""
    sites, choices = problem.value.shape
    one_hot = np.kron(np.eye(sites), np.ones(choices))
    out = linprog(
        problem.value.ravel(),
        A_ub=problem.resources.reshape(len(problem.budgets), -1),
        b_ub=problem.budgets,
        A_eq=one_hot,
        b_eq=np.ones(sites),
        bounds=[(0, float(ok)) for ok in problem.legal.ravel()],
        method="highs-ds",
    )
    assert out.status == 0
    return out.x.reshape(sites, choices), -out.ineqlin.marginals


@pytest.mark.parametrize("resources", [1, 2])
@pytest.mark.parametrize("seed", range(10))
def test_reduced_costs_are_those_of_the_dual(seed, resources):
    problem = random_problem(seed, resources)
    share, price = highs(problem)
    assert (price > 0).any()
    choice = share.argmax(axis=1)
    mean = share @ np.asarray(problem.w_bits, np.float64)
    whole = share.max(axis=1) > 1 - 1e-9
    assert resources >= (~whole).sum() >= 1
    sites = [site(f"s{i}") for i in range(len(share))]
    rows = explain(problem, allocate(choice, price=price, fractional=mean), sites)
    for index, row in enumerate(rows):
        assert row["reduced_cost"] == pytest.approx(0.0, abs=1e-9)  # complementary slackness
        assert ("fractional" in row["verdict"]) == (not whole[index])
        for step in filter(None, (row["wider"], row["narrower"])):
            priced = sum(row["price"][name] * step["cost"][name] for name in problem.names)
            assert step["priced"] == pytest.approx(priced, rel=1e-12)
            assert step["damage"] + step["priced"] >= -1e-9
    # At other prices the same choices are not optimal: the figures do depend on the price.
    for factor in (0.3, 3.0):
        rows = explain(problem, allocate(choice, price=factor * price), sites)
        assert max(row["reduced_cost"] for row in rows) > 1e-2


@pytest.mark.parametrize("seed", range(5))
def test_the_solver_prices_are_highs_prices(seed):
    problem = random_problem(seed, 1)
    found = solve.solve(problem)
    rows = explain(problem, found, [site(f"s{i}") for i in range(30)])
    assert rows[0]["price"]["bytes"] == pytest.approx(highs(problem)[1][0], rel=1e-7)
    off = [row for row in rows if "though the prices ask" in row["verdict"]]
    fractional = [row for row in rows if "fractional at the vertex" in row["verdict"]]
    assert len(fractional) == 1
    # Their reduced costs are what rounding lost: the gap.
    loss = sum(row["reduced_cost"] for row in rows)
    spent = solve.feasible.spent(np.asarray(problem.resources[0]), found.choice)
    slack = rows[0]["price"]["bytes"] * (problem.budgets[0] - spent)
    assert loss + slack == pytest.approx(found.gap, rel=1e-6, abs=1e-9)
    assert all(row["reduced_cost"] > 0 for row in off)


def verdicts(problem, allocation, *, pins=(), kinds=()):
    sites = [site(f"s{i}", dict(pins).get(i), dict(kinds).get(i, "dense"))
             for i in range(len(problem.value))]  # fmt: skip
    return [row["verdict"] for row in explain(problem, allocation, sites)]


VALUE = [[9.0, 1.0, 0.5], [3.0, 2.0, 0.0], [4.0, 3.0, 2.0]]
COST = [[[2.0, 4.0, 8.0]] * 3]


def test_what_verdicts_say():
    problem = make(VALUE, COST, [13.0], legal=[[True] * 3, [True] * 3, [False, True, False]])
    found = verdicts(problem, allocate([1, 0, 1], price=[0.5], fractional=[4.0, 3.0, 4.0]))
    assert found == [
        "4 bit: 8 bit would save 0.5 damage and cost 2 at the price of bytes; "
        "2 bit would add 8 damage and free 1 at the price of bytes",
        "fractional at the vertex (3 bits), rounded down to 2 bit: "
        "4 bit would save 1 damage and cost 1 at the price of bytes",
        "4 bit: the only legal choice",
    ]
    assert (
        verdicts(problem, allocate([1, 0, 1], price=[0.5]), pins=[(2, 4)])[2] == "pinned at 4 bit"
    )
    rose = verdicts(problem, allocate([2, 0, 1], price=[0.5], fractional=[4.0, 2.0, 4.0]))
    assert rose[0].startswith(
        "8 bit, though the prices ask for 4 bit (raised by what rounding left over): 4 bit would"
    )
    fell = verdicts(problem, allocate([0, 0, 1], price=[0.5], fractional=[4.0, 2.0, 4.0]))
    assert fell[0].startswith("2 bit, though the prices ask for 4 bit (that did not fit): 4 bit")
    other = verdicts(problem, allocate([0, 0, 1], price=[0.5]))
    assert "(the solver does not follow prices)" in other[0]
    free = verdicts(problem, allocate([2, 2, 1], price=[0.0], fractional=[8.0, 8.0, 4.0]))
    assert free[0] == (
        "8 bit, as no budget binds: 4 bit would add 0.5 damage and cost nothing that is scarce"
    )


def test_without_prices_the_row_says_so():
    problem = make(VALUE, COST, [20.0])
    rows = explain(problem, allocate([1, 1, 1]), [site(f"s{i}") for i in range(3)])
    assert all(row["price"] is None and row["reduced_cost"] is None for row in rows)
    assert rows[0]["wider"] == {
        "w_bits": 8, "a_bits": 8, "damage": -0.5, "cost": {"bytes": 4.0}, "priced": None
    }  # fmt: skip
    assert rows[0]["verdict"] == (
        "4 bit, of an allocation without prices: 8 bit would save 0.5 damage and take +4 bytes; "
        "2 bit would add 8 damage and take -2 bytes"
    )
    assert text(rows, ".*").startswith("no prices: ")


def test_steps_skip_what_costs_the_same():
    # 3 bits take the room of 4, 6 that of 8: a step goes to the widest for its price.
    value, cost = [[5.0, 4.0, 3.0, 2.0, 1.0]], [[[1.0, 2.0, 2.0, 4.0, 4.0]]]
    problem = make(value, cost, [9.0], w_bits=(2, 3, 4, 6, 8))
    rows = [explain(problem, allocate([k], price=[1.0]), [site("s")])[0] for k in range(5)]
    widths = [[row[way] and row[way]["w_bits"] for way in ("narrower", "wider")] for row in rows]
    assert widths == [[None, 4], [2, 4], [2, 8], [4, 8], [4, None]]


def test_pairs_and_float():
    # Up from (4,8) is (8,8), down from (8,4) is (4,4): no operand may go the other way.
    value, cost = [[9.0, 7.0, 6.0, 2.0, 0.0]], [[[1.0, 2.0, 2.0, 4.0, 5.0]]]
    problem = make(value, cost, [9.0], w_bits=(4, 4, 8, 8, 32), a_bits=[4, 8, 4, 8, 32],
                   names=("seconds",))  # fmt: skip

    def row(choice, kind="dense"):
        return explain(problem, allocate([choice], price=[1.0]), [site("s", kind=kind)])[0]

    def pair(step):
        return step["w_bits"], step["a_bits"]

    assert pair(row(1)["wider"]) == (8, 8) and pair(row(1)["narrower"]) == (4, 4)
    assert pair(row(2)["narrower"]) == (4, 4) and pair(row(3)["wider"]) == (32, 32)
    assert row(1)["verdict"].startswith("4 by 8 bit, though the prices ask for float")
    assert row(3, "product")["verdict"].startswith("8 bit, though")
    assert row(4)["verdict"] == (
        "float: 8 by 8 bit would add 2 damage and free 1 at the price of seconds"
    )
    slow = make([[2.0, 0.0]], [[[4.0, 3.0]]], [9.0], w_bits=(8, 32), a_bits=[8, 32],
                names=("seconds",))  # fmt: skip
    verdict = explain(slow, allocate([1], price=[1.0]), [site("s")])[0]["verdict"]
    assert verdict == (
        "kept in float: faster: 8 bit would add 2 damage and cost 1 at the price of seconds"
    )


def test_tied_sites_show_the_figures_of_their_group():
    problem = make(VALUE, COST, [20.0], tie=[5, 3, 5])
    rows = explain(problem, allocate([1, 1, 1], price=[0.5]), [site(f"s{i}") for i in range(3)])
    assert rows[0]["wider"]["damage"] == -1.5 and rows[0]["wider"]["cost"]["bytes"] == 8.0
    assert {key: rows[0][key] for key in ("wider", "narrower")} == {
        key: rows[2][key] for key in ("wider", "narrower")
    }
    assert rows[0]["verdict"].endswith("; tied with s2") and rows[2]["tied"] == ["s0"]
    assert rows[1]["tied"] == [] and "tied" not in rows[1]["verdict"]


def test_text_is_a_table_of_the_sites_asked_for():
    problem = make(VALUE, COST, [13.0])
    sites = [site("block_0/attn/qkv"), site("block_0/attn/proj"), site("final")]
    rows = explain(problem, allocate([1, 0, 2], price=[0.5]), sites)
    found = text(rows, "block_0/.*")
    assert found.splitlines()[0] == "price in damage: 0.5 per unit of bytes"
    assert "block_0/attn/qkv" in found and "block_0/attn/proj" in found and "final" not in found
    assert "4 x 8" in found and rows[0]["verdict"] in found
    for wrong, near in {"attn": "block_0/attn/qkv, block_0/attn/proj", "finnal": "final"}.items():
        with pytest.raises(
            InputError, match=f"no site matches '{wrong}' as a whole; near it: {near}"
        ):
            text(rows, wrong)
    with pytest.raises(InputError, match="is not a regex"):
        text(rows, "block_(")


def test_unusable_input():
    problem = make(VALUE, COST, [13.0])
    sites = [site(f"s{i}") for i in range(3)]
    with pytest.raises(InputError, match="3 sites, an allocation of 2"):
        explain(problem, allocate([0, 1]), sites)
    with pytest.raises(InputError, match="no allocation fits the budgets"):
        explain(problem, replace(allocate([0, 0, 0]), status=Status.INFEASIBLE), sites)

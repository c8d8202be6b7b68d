"""Evolution: against brute force and chance, its counts, and what its operators promise."""

import itertools

import jax
import numpy as np
import pytest

from mpqdiff.errors import InputError
from mpqdiff.solve import solve
from mpqdiff.solve.evolution import PAPER, Genes, Schedule, cross, knapsack, repaired, search
from mpqdiff.solve.feasible import rows


def hard(make_problem, seed, sites=12, resources=1):
    """Half of what can be spent, of costs that rise with the width and damage that falls."""
    rng = np.random.default_rng(seed)
    value = np.sort(rng.uniform(size=(sites, 4)) ** 3, axis=1)[:, ::-1]
    cost = np.cumsum(rng.uniform(0.1, 1, (resources, sites, 4)), axis=2)
    return make_problem(value, cost, cost.mean(axis=2).sum(axis=1))


def evolve(problem, seed=0, **kwargs):
    return solve(problem, "evolution", key=jax.random.key(seed), **kwargs)


def recorded(problem):
    """A fitness that is the table's sum, and the list of the populations it was asked for."""
    asked = []

    def fitness(choices):
        asked.append(choices.copy())
        return problem.value[np.arange(len(problem.value)), choices].sum(axis=1)

    return fitness, asked


def test_beats_random_on_average_and_is_never_worse_than_uniform(make_problem):
    wins = []
    for seed in range(5):
        problem = hard(make_problem, seed)
        chance = [solve(problem, "random", key=jax.random.key(key)).objective for key in range(10)]
        out = evolve(problem, seed)
        assert out.objective <= solve(problem, "uniform").objective
        wins.append(np.mean(chance) / out.objective)
    assert np.mean(wins) > 1.3


@pytest.mark.parametrize("resources", [1, 2])
def test_equals_brute_force_on_a_tiny_problem(make_problem, resources):
    for seed in range(4):
        problem = hard(make_problem, seed, 4, resources)
        choices = np.array(list(itertools.product(range(4), repeat=4)))
        used = problem.resources[:, np.arange(4), choices].sum(axis=2)
        within = (used <= problem.budgets[:, None]).all(axis=0)
        value = problem.value[np.arange(4), choices].sum(axis=1)
        np.testing.assert_allclose(evolve(problem, seed).objective, value[within].min())


def test_every_individual_is_new_and_within_the_budgets(make_problem):
    problem = hard(make_problem, 0, 8, resources=2)
    for repair in (True, False):
        fitness, asked = recorded(problem)
        evolve(problem, fitness=fitness, repair=repair)
        assert [len(each) for each in asked] == [PAPER.population] * PAPER.generations
        everyone = np.concatenate(asked)
        assert len(np.unique(everyone, axis=0)) == len(everyone) == 1000
        used = problem.resources[:, np.arange(8), everyone].sum(axis=2)
        assert (used <= problem.budgets[:, None] * (1 + 1e-12)).all()


def test_the_key_decides(make_problem):
    problem, runs = hard(make_problem, 1), []
    for seed in (3, 3, 4):
        fitness, asked = recorded(problem)
        evolve(problem, seed, fitness=fitness, schedule=Schedule(generations=3))
        runs.append(np.concatenate(asked))
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0] != runs[2]).any()


def test_starts_from_uniform_and_seeds(make_problem):
    problem = hard(make_problem, 2)
    best = solve(problem).choice
    fitness, asked = recorded(problem)
    out = evolve(problem, fitness=fitness, seeds=best, schedule=Schedule(generations=2))
    np.testing.assert_array_equal(asked[0][0], solve(problem, "uniform").choice)
    np.testing.assert_array_equal(asked[0][1], best)
    assert out.objective <= solve(problem).objective
    # The rest: half random, half near one of the two.
    near = (asked[0][:, None] == asked[0][None, :2]).mean(axis=2).max(axis=1)
    assert near[2:26].mean() < 0.6 < 0.7 < near[26:].mean()


def test_a_seed_above_the_budget_is_repaired_or_dropped(make_problem):
    problem = hard(make_problem, 2)
    for repair in (True, False):
        fitness, asked = recorded(problem)
        evolve(problem, fitness=fitness, seeds=np.full((1, 12), 3), repair=repair)
        used = problem.resources[0, np.arange(12), np.concatenate(asked)].sum(axis=1)
        assert (used <= problem.budgets * (1 + 1e-12)).all()


def test_the_fitness_decides_and_the_record_is_the_tables(make_problem):
    problem = hard(make_problem, 3)
    out = evolve(problem, fitness=lambda choices: (choices != 1).sum(axis=1))
    np.testing.assert_array_equal(out.choice, 1)
    np.testing.assert_allclose(out.objective, problem.value[:, 1].sum())
    assert out.bound <= solve(problem).objective


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fitness": lambda choices: choices}, "expected 50 numbers"),
        ({"fitness": lambda choices: np.full(len(choices), np.nan)}, "none NaN"),
        ({"seeds": np.full(12, 4)}, r"not legal at sites \[0, 1, 2"),
        ({"seeds": np.ones(12)}, "expected integers"),
        ({"schedule": Schedule(parents=0)}, "at least 1"),
    ],
)
def test_bad_arguments(make_problem, arguments, message):
    with pytest.raises(InputError, match=message):
        evolve(hard(make_problem, 0), **arguments)


def test_search_knows_nothing_of_knapsacks():
    # Genes of another kind: sorted distinct timesteps, whose sum of distances is to be least.
    wanted = np.array([3, 40, 200, 777])

    def draw(rng, count):
        return np.sort(rng.integers(0, 1000, (count, 4)), axis=1)

    def mutate(rng, steps, rate):
        moved = steps + rng.integers(-20, 21, steps.shape) * (rng.random(steps.shape) < rate)
        return np.sort(np.clip(moved, 0, 999), axis=1)

    def admit(rng, steps):
        return steps[(np.diff(steps, axis=1) > 0).all(axis=1)]

    def fitness(steps):
        return np.abs(steps - wanted).sum(axis=1)

    genes, first = Genes(draw, mutate, cross, admit), np.array([[0, 1, 2, 3]])
    rng = np.random.default_rng(0)
    best, score = search(fitness, first, genes, rng, Schedule(generations=60))
    assert best.shape == (50, 4)
    assert (np.diff(score) >= 0).all()
    np.testing.assert_array_equal(score, fitness(best))
    assert score[0] < 40
    short = search(fitness, first, genes, np.random.default_rng(0), Schedule(generations=1))
    assert short[1][0] > score[0]


def test_a_space_smaller_than_the_population_is_seen_once(make_problem):
    problem = make_problem([[1.0, 0.5, 0.0]] * 2, [[1.0, 2.0, 3.0]] * 2, 4.0)
    fitness, asked = recorded(problem)
    out = evolve(problem, fitness=fitness)
    assert len(np.concatenate(asked)) == 6  # of the nine, those that spend at most 4
    assert out.objective == 1.0


def test_repair_lowers_until_the_budgets_hold_and_leaves_the_rest(make_problem):
    problem = hard(make_problem, 5, resources=2)
    table, rng = rows(problem), np.random.default_rng(0)
    before = knapsack(table, np.zeros(12, int)).draw(rng, 200)
    after = repaired(rng, table, np.zeros(12, int), before)
    ok = (table.cost[:, np.arange(12), before].sum(axis=2) <= table.limit[:, None]).all(axis=0)
    assert 0.2 < ok.mean() < 0.8
    np.testing.assert_array_equal(before[ok], after[ok])
    used = table.cost[:, np.arange(12), after].sum(axis=2)
    assert (used <= table.limit[:, None]).all()
    assert (after <= before).all()
    # No further than needed: the last step undone is above a budget, so most stay close to it.
    assert (used[:, ~ok] / table.limit[:, None]).max(axis=0).mean() > 0.9


def test_repair_falls_back_to_the_base_where_lowering_is_not_enough(make_problem):
    # By shares the first choice is the cheaper, but only the second is fast enough.
    problem = make_problem([[1.0, 0.0]] * 2, [[[0.0, 9.0]] * 2, [[3.0, 2.0]] * 2], [20.0, 4.0])
    base = np.array([1, 1])
    out = repaired(np.random.default_rng(0), rows(problem), base, np.array([[0, 0], [1, 0]]))
    np.testing.assert_array_equal(out, [base, base])


def test_pins_stay_and_all_legal_choices_are_drawn(make_problem):
    legal = np.array([[True, False, True], [False, True, False]])
    problem = make_problem(np.ones((2, 3)), np.ones((2, 3)), 2.0, legal=legal)
    genes, rng = knapsack(rows(problem), np.array([0, 1])), np.random.default_rng(0)
    drawn = genes.draw(rng, 200)
    assert set(drawn[:, 0]) == {0, 2} and set(drawn[:, 1]) == {1}
    children = genes.mutate(rng, drawn, 0.25)
    # A gene that mutates may draw what it was.
    assert 0.05 < (children[:, 0] != drawn[:, 0]).mean() < 0.2
    assert set(children[:, 1]) == {1}

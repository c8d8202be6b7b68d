"""Sites that must take the same choice become one site for the solvers, and are expanded after."""

from dataclasses import replace

import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.records import Allocation, Problem


def collapse(problem: Problem) -> tuple[Problem, np.ndarray]:
    """The problem with one site per tie group, and the group of each site, int64 [L].

    Values, resources and parameters of a group add up; a choice is legal where every member
    allows it. Groups keep the depth order of their first member. Raises InputError where the
    members of a group have no legal choice in common.
    """
    _, first, inverse = np.unique(problem.tie, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    group = rank[inverse]
    count = len(first)

    def total(array):
        array = np.asarray(array)
        out = np.zeros((count, *array.shape[1:]), array.dtype)
        np.add.at(out, group, array)
        return out

    legal = total(~np.asarray(problem.legal)) == 0
    empty = np.flatnonzero(~legal.any(axis=1))
    if len(empty):
        members = np.flatnonzero(group == empty[0]).tolist()
        raise InputError(f"tied sites {members} have no legal choice in common: pin them alike")
    resources = np.asarray(problem.resources, np.float64)
    collapsed = replace(
        problem,
        value=total(np.asarray(problem.value, np.float64)),
        resources=np.stack([total(one) for one in resources]),
        legal=legal,
        tie=np.arange(count, dtype=np.int32),
        parameters=total(problem.parameters),
    )
    return collapsed, group


def expand(allocation: Allocation, group: np.ndarray) -> Allocation:
    """An allocation over groups as one over sites."""
    fractional = allocation.fractional
    return replace(
        allocation,
        choice=np.asarray(allocation.choice)[group],
        fractional=None if fractional is None else np.asarray(fractional)[group],
    )


def on_groups(arguments: dict, group: np.ndarray) -> dict:
    """A solver's `fitness`, `seeds` [P,L] and `score` [L], which know sites, for a problem over
    groups; a group has the largest score of its members."""
    out = dict(arguments)
    score = out.get("score")
    if score is not None:
        if np.shape(score) != group.shape:
            raise InputError(f"score has shape {np.shape(score)}, expected [{len(group)}]")
        if not np.isfinite(score).all():
            raise InputError(f"score {score}: expected finite ones, [L]")
        out["score"] = np.full(group.max() + 1, -np.inf)
        np.maximum.at(out["score"], group, np.asarray(score, np.float64))
    fitness, seeds = out.get("fitness"), out.get("seeds")
    if fitness is not None:
        out["fitness"] = lambda choices: fitness(choices[:, group])
    if seeds is not None:
        seeds = np.atleast_2d(np.asarray(seeds))
        _, first = np.unique(group, return_index=True)
        if seeds.shape[1:] != group.shape:
            raise InputError(f"seeds have shape {seeds.shape}, expected [P,{len(group)}]")
        if (seeds != seeds[:, first][:, group]).any():
            raise InputError("seeds give tied sites different choices")
        out["seeds"] = seeds[:, first]
    return out

"""Which pairs are run, that damage falls with bits, and what the previews count."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpqdiff.errors import InputError
from mpqdiff.sensitivity import damage
from mpqdiff.sites import Site

CHOICES = [(2, 4), (2, 8), (8, 4), (8, 8), (32, 32)]
SITES = [
    Site("a", "dense", (2, 3), 6, 3, 6, "a"),
    Site("b", "product", (), 0, 0, 50, "b"),
    Site("c", "conv", (1, 1, 2, 3), 6, 0, 24, "c"),
]
ALL = np.ones((3, 5), bool)


def test_pairs_are_the_distinct_integer_choices_of_undecided_sites():
    legal = ALL.copy()
    legal[2] = [False, False, True, False, False]
    assert damage.measured(SITES, CHOICES, legal) == [
        *((0, k) for k in range(4)),
        (1, 0),  # a product has no weights: (2, 4) and (8, 4) are one to it
        (1, 1),
    ]
    legal[1, [0, 4]] = False
    assert [pair for pair in damage.measured(SITES, CHOICES, legal) if pair[0] == 1] == [
        (1, 1),
        (1, 2),
    ]


def test_choices_that_are_one_to_a_site_share_their_damage():
    pairs = damage.measured(SITES, CHOICES, ALL)
    found = np.arange(1.0, 1 + len(pairs))[::-1][None]
    value = damage.scores("x", found, pairs, SITES, CHOICES, ALL).value[0]
    np.testing.assert_array_equal(value[1], [6, 5, 6, 5, 0])
    np.testing.assert_array_equal(value[0], [10, 9, 8, 7, 0])


def test_damage_becomes_the_least_of_the_narrower_choices():
    value = np.array([[[4.0, 5.0, 3.0, 4.5, 0.0]]])
    fixed, violations = damage.monotone(value, CHOICES, ALL[:1])
    np.testing.assert_array_equal(fixed, [[[4, 4, 3, 3, 0]]])
    assert violations == 2
    # What is not legal neither changes nor lowers another.
    legal = np.array([[True, True, False, True, True]])
    fixed, violations = damage.monotone(value, CHOICES, legal)
    np.testing.assert_array_equal(fixed, [[[4, 4, 3, 4, 0]]])
    assert violations == 2
    assert damage.monotone(fixed, CHOICES, legal)[1] == 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_monotone_damage_never_rises_and_never_exceeds_what_was_measured(data):
    widths = st.tuples(st.integers(2, 8), st.integers(2, 8))
    choices = data.draw(st.lists(widths, min_size=1, max_size=7, unique=True))
    seed = data.draw(st.integers(0, 999))
    rng = np.random.default_rng(seed)
    value, legal = rng.exponential(size=(2, 3, len(choices))), rng.random((3, len(choices))) < 0.7
    fixed, violations = damage.monotone(value, choices, legal)
    assert (fixed <= value).all() and violations == (fixed != value).sum()
    for k, (w, a) in enumerate(choices):
        for j, (other_w, other_a) in enumerate(choices):
            both = legal[:, k] & legal[:, j]
            if other_w <= w and other_a <= a:
                assert (fixed[:, both, k] <= fixed[:, both, j]).all()
    assert np.isin(fixed, value).all()


def test_previews():
    # Site a has 4 pairs, b has 2, c has 4; the float pass comes on top.
    counts = {"output_error": 7 * 5 * 5, "eps_error": 7 * 5 * 11, "rollout_error": 20 * 5 * 11}
    for name, expected in counts.items():
        assert damage.evaluations(name, SITES, CHOICES, 7, 5, 20) == expected
    for name in ("weight_error", "orthogonality", "random"):
        assert damage.evaluations(name, SITES, CHOICES, 7, 5, 20) == 0
    pinned = ALL & (np.arange(5) == 0)
    assert damage.evaluations("eps_error", SITES, CHOICES, 7, 5, 20, legal=pinned) == 0


@pytest.mark.parametrize(("evaluations", "sizes"), [(1, [4]), (40, [3, 1]), (10**9, [1] * 4)])
def test_chunks_hold_what_their_evaluations_allow(monkeypatch, evaluations, sizes):
    monkeypatch.setattr(damage, "MACS_PER_CHUNK", 3 * 40 * 80)  # one evaluation has 80 MACs
    seen = []

    def chunks(count, compute):
        parts = damage.in_memory(count, compute)
        seen.extend(len(part["damage"]) for part in parts)
        return parts

    found = damage.in_chunks(
        [3, 1, 4, 1], lambda i: np.full(2, i), chunks, evaluations=evaluations, sites=SITES
    )
    np.testing.assert_array_equal(found, [[3, 3], [1, 1], [4, 4], [1, 1]])
    assert seen == sizes


def test_damage_that_is_not_finite_names_the_site_and_the_choice():
    pairs = damage.measured(SITES, CHOICES, ALL)
    found = np.where(np.arange(len(pairs)) == 5, np.inf, 1.0)[None]
    with pytest.raises(InputError, match=r"x of site 'b' at \(2, 8\) bits is not finite"):
        damage.scores("x", found, pairs, SITES, CHOICES, ALL)


@pytest.mark.parametrize(
    ("legal", "message"),
    [
        (ALL[:2], r"legal is bool \(2, 5\), expected bool \(3, 5\)"),
        (ALL.astype(int), r"legal is int64 \(3, 5\)"),
        (ALL & (np.arange(3) != 1)[:, None], r"no legal choice at \['b'\]"),
    ],
)
def test_bad_legality_is_refused(legal, message):
    with pytest.raises(InputError, match=message):
        damage.measured(SITES, CHOICES, legal)


def test_choices_that_are_not_are_refused():
    with pytest.raises(InputError, match="expected pairs"):
        damage.measured(SITES[:1], [(4, 32)], ALL[:1, :1])

"""The metric against a plain double loop, its laws, golden values, and the degenerate sites."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff.errors import InputError
from mpqdiff.records import Statistics
from mpqdiff.sensitivity import orthogonality
from mpqdiff.sensitivity.orthogonality import mean_redundancy, null_bias, orm

GOLDEN_FEATURES = [
    np.array([[1, 2], [3, 4], [5, 7], [-2, 0], [0, 1.0]]),
    np.array([[1, 0, 1], [0, 2, 1], [2, 2, -1], [1, -1, 0], [0, 0, 3.0]]),
    np.array([[1], [-1], [1], [0], [2.0]]),
]
GOLDEN = {
    "uncentered": (0.647575186, 0.0782123747, 0.2897528505),
    "centered": (0.6666431869, 0.0110049537, 0.1466201016),
    "debiased": (0.4109514068, -0.1822969785, -0.6222573478),
}

JITTED = jax.jit(lambda gram, row_sums, name: orm(gram, name, row_sums), static_argnums=2)


def reduce(features, dtype=np.float64):
    """What recording keeps of features [N,d] per site: centred Grams and raw row sums."""
    centred = [x - x.mean(0) for x in features]
    gram = np.stack([c @ c.T for c in centred]).astype(dtype)
    return gram, np.stack([(x @ x.T).sum(1) for x in features]).astype(dtype)


def metric(features, estimator="centered"):
    """`orm` in float64."""
    with jax.enable_x64(True):
        return np.asarray(JITTED(*reduce(features), estimator))


def hsic_unbiased(k, g):
    """Song et al. 2012, equation 5, term by term."""
    n, one = len(k), np.ones(len(k))
    k, g = k - np.diag(np.diag(k)), g - np.diag(np.diag(g))
    cross = (one @ k @ one) * (one @ g @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ g) + cross - 2 / (n - 2) * (one @ k @ g @ one)) / (n * (n - 3))


def oracle(features, estimator):
    """The double loop over ordered pairs, Grams rebuilt for each."""
    size = len(features[0])
    h = np.eye(size) - 1 / size if estimator == "centered" else np.eye(size)
    inner = hsic_unbiased if estimator == "debiased" else lambda k, g: np.sum(k * g)
    out = np.zeros((len(features), len(features)))
    for i, x in enumerate(features):
        for j, y in enumerate(features):
            k, g = h @ x @ x.T @ h, h @ y @ y.T @ h
            out[i, j] = inner(k, g) / np.sqrt(inner(k, k) * inner(g, g))
    return out


def draw(seed, widths=(3, 7, 20, 40), samples=12, shared=2):
    """Features with a common part, so that the metric is neither 0 nor 1."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(samples, shared))
    return [
        common @ rng.normal(size=(shared, d)) + rng.normal(size=(samples, d)) + rng.normal(size=d)
        for d in widths
    ]


def statistics(features_by_t, time_only=None, pooled=None):
    """`Statistics` of features [T][L] of arrays [N,d]; pooled rows default to the first t's."""
    sites, count = len(features_by_t[0]), len(features_by_t)
    grams, row_sums = zip(*(reduce(f, np.float32) for f in features_by_t), strict=True)
    pooled_gram, pooled_rows = reduce(pooled or features_by_t[0], np.float32)
    return Statistics(
        timesteps=jnp.arange(count)[::-1],
        gram=jnp.asarray(np.stack(grams)),
        row_sums=jnp.asarray(np.stack(row_sums)),
        pooled_gram=jnp.asarray(pooled_gram),
        pooled_row_sums=jnp.asarray(pooled_rows),
        time_only=jnp.asarray(time_only or [False] * sites),
        input_min=jnp.zeros((count, sites, 2)),
        input_max=jnp.zeros((count, sites, 2)),
    )


@pytest.mark.parametrize("estimator", GOLDEN)
def test_golden_values(estimator):
    got = metric(GOLDEN_FEATURES, estimator)[np.triu_indices(3, 1)]
    np.testing.assert_allclose(got, GOLDEN[estimator], atol=1e-9)


@pytest.mark.parametrize("estimator", GOLDEN)
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_double_loop(estimator, seed):
    features = draw(seed)
    expected = oracle(features, estimator)
    np.testing.assert_allclose(metric(features, estimator), expected, atol=1e-12)
    gram, row_sums = reduce(features, np.float32)
    np.testing.assert_allclose(JITTED(gram, row_sums, estimator), expected, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_symmetric_bounded_positive_semidefinite_with_unit_diagonal(seed):
    r = metric(draw(seed))
    np.testing.assert_array_equal(r, r.T)
    np.testing.assert_array_equal(np.diag(r), 1.0)
    assert r.min() >= 0
    assert r.max() <= 1 + 1e-12
    assert np.linalg.eigvalsh(r).min() >= -1e-6


def test_gram_form_equals_feature_form():
    x, y = (f - f.mean(0) for f in draw(1, widths=(5, 9)))
    feature = np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    np.testing.assert_allclose(metric([x, y])[0, 1], feature, atol=1e-12)


def test_invariances():
    features = draw(2)
    x, others = features[1], [features[0], *features[2:]]
    before = metric([x, *others])[0]
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(7, 7)))[0]
    same = {
        "scale": -3.7 * x,
        "rotation": x @ rotation,
        "shift": x + rng.normal(size=7),
        "zero columns": np.pad(x, ((0, 0), (0, 4))),
        "duplicated columns": np.concatenate([x, x], axis=1),
    }
    for name, changed in same.items():
        np.testing.assert_allclose(metric([changed, *others])[0], before, atol=1e-12, err_msg=name)
    order = rng.permutation(len(x))
    permuted = metric([x[order], *(o[order] for o in others)])[0]
    np.testing.assert_allclose(permuted, before, atol=1e-12)
    stretched = metric([x @ np.diag(np.arange(1.0, 8.0)), *others])[0]
    assert np.abs(stretched - before)[1:].min() > 1e-3  # a general map does change it


def test_one_iff_proportional_and_zero_iff_orthogonal():
    x = np.array([[1, 0], [0, 1], [-1, 0], [0, -1.0]])
    y = np.array([[1], [0], [-1], [0.0]])
    z = np.array([[1], [-1], [1], [-1.0]])
    r = metric([x, y, z, 5 * z + 2])
    np.testing.assert_allclose(r[0, 1:3], [2**-0.5, 0.0], atol=1e-15)
    np.testing.assert_allclose(r[1, 2], 0.0, atol=1e-15)
    np.testing.assert_allclose(r[2, 3], 1.0, atol=1e-15)


def test_uncentered_is_driven_to_one_by_a_common_mean():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 64, 256))
    got = [metric([x + mu, y + mu], "uncentered")[0, 1] for mu in (0, 0.5, 1, 3)]
    np.testing.assert_allclose(got, [0.80, 0.93, 0.99, 0.999], atol=0.01)
    shifted = metric([x + 1.0, y + 1.0])[0, 1]
    np.testing.assert_allclose(shifted, metric([x, y])[0, 1], atol=1e-12)


def test_debiased_may_be_negative_and_needs_four_samples():
    r = metric(GOLDEN_FEATURES, "debiased")
    assert r[0, 2] < 0
    redundancy = mean_redundancy(jnp.asarray(r), jnp.ones(3, bool))
    np.testing.assert_allclose(redundancy, [r[0, 1] / 2, r[0, 1] / 2, 0.0], atol=1e-6)
    with pytest.raises(InputError, match="at least 4"):
        metric([f[:3] for f in GOLDEN_FEATURES], "debiased")


def test_debiased_self_similarity_of_nothing_is_guarded():
    one_hot = np.eye(6)  # equal off the diagonal: its U-centred Gram is zero
    r = metric([one_hot, draw(0, samples=6)[0]], "debiased")
    np.testing.assert_array_equal(r, [[0, 0], [0, 1]])


@pytest.mark.parametrize(
    ("samples", "p", "q", "trials"), [(64, 8, 8, 60), (32, 512, 512, 3), (64, 64, 4096, 3)]
)
def test_null_law(samples, p, q, trials):
    rng = np.random.default_rng(samples + p)
    pairs = [[rng.normal(size=(samples, d)) for d in (p, q)] for _ in range(trials)]
    biased = np.mean([metric(pair)[0, 1] for pair in pairs])
    np.testing.assert_allclose(biased, null_bias(p, q, samples), atol=0.01)
    if samples >= 64:
        assert abs(np.mean([metric(pair, "debiased")[0, 1] for pair in pairs])) < 0.03


def test_score_is_the_unbatched_metric_at_every_timestep():
    by_t = [draw(seed) for seed in range(4)]
    scores = orthogonality.score(statistics(by_t))
    assert scores.kind == "redundancy"
    for t, features in enumerate(by_t):
        r = oracle(features, "centered")
        np.testing.assert_allclose(scores.matrix[t], r, atol=1e-5)
        np.testing.assert_allclose(scores.value[t], (r.sum(1) - 1) / 3, atol=1e-5)


def test_constant_site_leaves_the_means_of_the_others():
    features = draw(3)
    without = (oracle([features[i] for i in (0, 2, 3)], "centered").sum(1) - 1) / 2
    constant = np.full((12, 5), 1000.0) + 1e-5 * np.random.default_rng(0).normal(size=(12, 5))
    for site in (np.zeros((12, 5)), constant):
        features[1] = site
        scores = orthogonality.score(statistics([features]))
        np.testing.assert_allclose(scores.value[0, [0, 2, 3]], without, atol=1e-5)
        assert scores.value[0, 1] == 0
        assert np.isfinite(scores.matrix).all()
        np.testing.assert_array_equal(scores.matrix[0, 1], 0.0)


def test_tiny_and_huge_grams_do_not_leave_float32():
    features = draw(4)
    expected = oracle(features, "centered")
    scaled = [x * s for x, s in zip(features, (1e-12, 1e-6, 1e6, 1e13), strict=True)]
    gram, row_sums = reduce(scaled, np.float32)
    np.testing.assert_allclose(JITTED(gram, row_sums, "centered"), expected, atol=1e-5)


def test_time_only_sites_are_pooled_or_left_to_a_pin():
    by_t, pooled = [draw(seed) for seed in range(3)], draw(9)
    stats = statistics(by_t, time_only=[False, True, False, False], pooled=pooled)
    keep = [0, 2, 3]
    over_pool = (oracle(pooled, "centered").sum(1) - 1) / 3
    for policy, expected in {"pooled": over_pool[1], "pin": 0.0}.items():
        value = orthogonality.score(stats, temporal_policy=policy).value
        np.testing.assert_allclose(value[:, 1], expected, atol=1e-5)
        for t, features in enumerate(by_t):
            r = oracle([features[i] for i in keep], "centered")
            np.testing.assert_allclose(value[t, keep], (r.sum(1) - 1) / 2, atol=1e-5)


@pytest.mark.parametrize("field", ["gram", "row_sums", "pooled_gram", "pooled_row_sums"])
def test_not_a_number_is_refused_by_name(field):
    stats = statistics([draw(0)])
    broken = stats.replace(**{field: getattr(stats, field).at[..., 0].set(jnp.nan)})
    with pytest.raises(InputError, match=rf"statistics: {field} is not finite at \[0"):
        orthogonality.score(broken)


def test_unknown_names_list_the_known_ones():
    stats = statistics([draw(0)])
    with pytest.raises(InputError, match="known: centered, debiased, uncentered"):
        orthogonality.score(stats, estimator="cosine")
    with pytest.raises(InputError, match="known: pin, pooled"):
        orthogonality.score(stats, temporal_policy="drop")
    with pytest.raises(InputError, match="row_sums"):
        orm(stats.gram[0], "uncentered")


def test_operation_count_does_not_depend_on_sizes():
    def count(timesteps, sites, samples):
        shape = (timesteps, sites, samples, samples)
        traced = jax.make_jaxpr(lambda g, r: jax.vmap(lambda k, s: orm(k, "debiased", s))(g, r))(
            jnp.zeros(shape), jnp.zeros(shape[:-1])
        )
        return len(traced.jaxpr.eqns)

    assert count(2, 3, 4) == count(7, 11, 8) > 5

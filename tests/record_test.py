"""Recorded statistics against a plain NumPy oracle on captured activations."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpqdiff.record as recording
from mpqdiff import intercept, models, sites, weights
from mpqdiff.denoiser import Prediction, from_linen
from mpqdiff.errors import InputError
from mpqdiff.kernels.gram.xla import SLICE
from mpqdiff.models.product import Product

T, N = 3, 8
TIMESTEPS = np.array([90, 40, 3], np.int32)
LABELS = np.arange(N, dtype=np.int32) % 3


class Net(nn.Module):
    """A conv, a product, and two branches that see (t, label) or t alone."""

    @nn.compact
    def __call__(self, x_t, t, label):
        batch = x_t.shape[0]
        x = nn.Conv(6, (3, 3), name="conv")(x_t).reshape(batch, 16, 6)
        c = nn.Embed(3, 5, name="label")(label) + 0.01 * jnp.atleast_1d(t)[:, None]
        c = nn.Dense(6, name="cond")(c)
        clock = nn.Dense(6, name="clock")(0.01 * jnp.atleast_1d(t)[:, None] + jnp.zeros((batch, 4)))
        x = nn.relu(x * c[:, None] + clock[:, None])
        x = Product("bpd,bqd->bpq", name="pairs")(x, x)
        return Prediction(nn.Dense(1, use_bias=False, name="last")(x).reshape(x_t.shape))


@pytest.fixture(scope="module")
def net():
    module = Net()
    rng = np.random.default_rng(0)
    x_ts = rng.normal(size=(T, N, 4, 4, 1)).astype(np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x_ts[0], TIMESTEPS[:1], LABELS)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32), shapes)
    params = params["params"]
    found, _ = sites.list_sites(from_linen(module), params, *sites.example_inputs((4, 4, 1)))
    return from_linen(module), params, x_ts, sites.planned(found, products=True)


@pytest.fixture(scope="module")
def stats(net):
    denoise, params, x_ts, listed = net
    return recording.record(denoise, params, x_ts, TIMESTEPS, LABELS, listed)


@pytest.fixture(scope="module")
def captured(net):
    """{path: (args, out)} at each timestep, as float64."""
    denoise, params, x_ts, _ = net
    rows = []
    for x_t, t in zip(x_ts, TIMESTEPS, strict=True):
        observed = intercept.observe(denoise, lambda path, module, kind, args, out: (args, out))
        _, taken = observed(params, x_t, jnp.full((N,), t), LABELS)
        rows.append(jax.tree.map(lambda x: np.asarray(x, np.float64), taken))
    return rows


def oracle(x):
    """Centred Gram and row sums of the raw one; x [N, ...] float64."""
    x = x.reshape(len(x), -1)
    return (x - x.mean(0)) @ (x - x.mean(0)).T, (x @ x.T).sum(1)


@pytest.mark.parametrize("features", [1, 5, SLICE, 2 * SLICE + 7])
def test_centred_gram_is_the_plain_one_whatever_the_width(features):
    x = np.random.default_rng(features).normal(size=(5, features)) + 3.0
    gram, row_sums = recording.centred_gram(jnp.asarray(x, jnp.float32))
    expected, sums = oracle(x.astype(np.float32).astype(np.float64))
    np.testing.assert_allclose(gram, expected, atol=2e-6 * np.abs(expected).max())
    np.testing.assert_allclose(row_sums, sums, rtol=2e-5)
    np.testing.assert_array_equal(gram, gram.T)


def test_centring_survives_a_mean_a_thousand_times_the_spread():
    x = (np.random.default_rng(0).normal(size=(6, 300)) + 1000.0).astype(np.float32)
    gram, _ = recording.centred_gram(jnp.asarray(x))
    expected, _ = oracle(x.astype(np.float64))
    assert np.abs(gram - expected).max() < 1e-3 * np.abs(expected).max()


def test_grams_and_row_sums_equal_the_oracle(net, stats, captured):
    np.testing.assert_array_equal(stats.timesteps, TIMESTEPS)
    for t in range(T):
        for place, site in enumerate(net[3]):
            gram, sums = oracle(captured[t][site.path][1])
            scale = np.abs(sums).max() + np.abs(gram).max()
            np.testing.assert_allclose(
                stats.gram[t, place], gram, atol=1e-5 * scale, err_msg=site.path
            )
            np.testing.assert_allclose(stats.row_sums[t, place], sums, atol=1e-5 * scale)


def test_the_raw_gram_follows_as_the_record_says(net, stats, captured):
    out = captured[1]["conv"][1].reshape(N, -1)
    index = [site.path for site in net[3]].index("conv")
    c = stats.row_sums[1, index].sum() / N**2
    r = stats.row_sums[1, index] / N - c
    raw = stats.gram[1, index] + r[:, None] + r[None] + c
    np.testing.assert_allclose(raw, out @ out.T, rtol=1e-4, atol=1e-3)


def test_ranges_cover_the_operands_and_zero(net, stats, captured):
    for t in range(T):
        for place, site in enumerate(net[3]):
            operands = captured[t][site.path][0]
            assert len(operands) == (2 if site.kind == "product" else 1)
            low = [min(x.min(), 0) for x in operands] + [0.0] * (2 - len(operands))
            high = [max(x.max(), 0) for x in operands] + [0.0] * (2 - len(operands))
            np.testing.assert_allclose(stats.input_min[t, place], low, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(stats.input_max[t, place], high, rtol=1e-5, atol=1e-6)
    # After the ReLU no minimum is below zero; before it one is.
    index = [site.path for site in net[3]].index("pairs")
    assert not stats.input_min[:, index].any() and stats.input_min.min() < 0


def test_pooled_rows_are_mixed_timesteps(net, stats, captured):
    rows = recording.pooled_rows(T, N)
    for place, site in enumerate(net[3]):
        mixed = np.stack([captured[rows[i]][site.path][1][i] for i in range(N)])
        gram, sums = oracle(mixed)
        scale = np.abs(sums).max() + np.abs(gram).max()
        np.testing.assert_allclose(stats.pooled_gram[place], gram, atol=1e-5 * scale)
        np.testing.assert_allclose(stats.pooled_row_sums[place], sums, atol=1e-5 * scale)


def test_pooled_rows_visit_timesteps_equally_and_are_not_tied_to_labels():
    rows = recording.pooled_rows(20, 64)
    counts = np.bincount(rows, minlength=20)
    assert counts.min() >= 3 and counts.max() <= 4
    pairs = {(row, i % 10) for i, row in enumerate(rows)}
    assert len(pairs) > 50  # i mod T would give 20


def test_sites_fed_by_time_and_label_alone_are_found(net, stats):
    denoise, params, x_ts, listed = net
    paths = [site.path for site in listed]
    flags = dict(zip(paths, stats.time_only, strict=True))
    assert {path for path, flag in flags.items() if flag} == {"cond", "clock"}
    # A zero test of the Gram would not do: the labels alone make one.
    assert np.abs(stats.gram[0, paths.index("cond")]).max() > 0.1
    assert np.abs(stats.gram[0, paths.index("clock")]).max() < 1e-6
    unlabelled = np.zeros(N, np.int32)
    found = recording.detect_time_only(denoise, params, x_ts[0], 90, unlabelled, listed)
    np.testing.assert_array_equal(found, stats.time_only)


@pytest.mark.parametrize("at_once", [1, 2])
def test_the_size_of_chunks_changes_nothing(net, stats, monkeypatch, at_once):
    denoise, params, x_ts, listed = net
    monkeypatch.setattr(recording, "timesteps_per_chunk", lambda *_: at_once)
    calls = []

    def chunks(count, compute):
        calls.append(count)
        return [compute(index) for index in range(count)]

    other = recording.record(denoise, params, x_ts, TIMESTEPS, LABELS, listed, chunks=chunks)
    assert calls == [-(-T // at_once)]
    for name, value in vars(stats).items():
        scale = max(np.abs(value).max(), 1e-6)
        np.testing.assert_allclose(vars(other)[name], value, atol=1e-5 * scale, err_msg=name)


def test_chunks_fill_the_memory_they_are_given(net):
    listed = net[3]
    one = recording.timesteps_per_chunk(listed, N, 1e-9)
    many = [recording.timesteps_per_chunk(listed, N, gb) for gb in (0.1, 0.2)]
    assert one == 1 and many[0] > 10 and abs(many[1] - 2 * many[0]) <= 1


def record_with(net, params=None, x_ts=None, **changes):
    denoise, good, inputs, listed = net
    arguments = {"timesteps": TIMESTEPS, "cond": LABELS, "sites": listed, **changes}
    return recording.record(
        denoise, good if params is None else params, inputs if x_ts is None else x_ts, **arguments
    )


def test_nan_in_the_inputs_names_site_and_timestep(net):
    x_ts = net[2].copy()
    x_ts[1, 2, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="'conv' holds NaN or infinity at timestep 40"):
        record_with(net, x_ts=x_ts)


def test_nan_in_the_weights_names_the_first_site(net):
    params = {**net[1], "last": {"kernel": net[1]["last"]["kernel"].at[0, 0].set(jnp.nan)}}
    with pytest.raises(InputError, match="'last' holds NaN or infinity at timestep 90"):
        record_with(net, params=params)


def test_rows_are_samples_whatever_is_folded_into_the_batch():
    out = jnp.arange(24.0).reshape(6, 4)
    assert recording.per_sample(out, 6, "a") is out
    folded = recording.per_sample(out, 3, "a")
    np.testing.assert_array_equal(folded.reshape(3, -1), out.reshape(3, 8))
    np.testing.assert_array_equal(recording.per_sample(out[:1], 3, "a")[2], out[0])
    with pytest.raises(InputError, match=r"'a/b' gives \[6, 4\] for 4 samples.*from_flax"):
        recording.per_sample(out, 4, "a/b")


def test_sites_that_are_not_there_and_shapes_that_do_not_fit(net):
    ghost = [*net[3], sites.Site("ghost", "dense", (2, 2), 4, 0, 4, "ghost")]
    with pytest.raises(InputError, match=r"never called by this model: \['ghost'\]"):
        record_with(net, sites=ghost)
    with pytest.raises(InputError, match=r"timesteps \(2,\)"):
        record_with(net, timesteps=TIMESTEPS[:2])
    with pytest.raises(InputError, match="0 sites"):
        record_with(net, sites=[])


def temporary_bytes(width):
    """(bare, recording) temporary memory of the compiled programs of a small DiT."""
    module = models.build(
        "dit", image_size=28, channels=1, patch=4, width=width, depth=1, num_heads=2, num_classes=3
    )
    denoise = from_linen(module)
    params = jax.eval_shape(lambda key: weights.initialise(module, key), jax.random.key(0))
    found, _ = sites.list_sites(denoise, params, *sites.example_inputs((28, 28, 1)))
    sample = (
        jax.ShapeDtypeStruct((4, 16, 28, 28, 1), jnp.float32),
        jax.ShapeDtypeStruct((4, 16), jnp.int32),
        jax.ShapeDtypeStruct((16,), jnp.int32),
    )
    recorder = recording.one_timestep(denoise, sites.planned(found))
    return [
        jax.jit(jax.vmap(function, in_axes=(None, 0, 0, None)))
        .lower(params, *sample)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for function in (lambda *call: denoise(*call).eps, recorder)
    ]


def test_memory_beyond_the_bare_forward_does_not_grow_with_the_activations():
    (bare, recorder), (bare_wide, recorder_wide) = temporary_bytes(48), temporary_bytes(96)
    assert bare_wide > 1.5 * bare  # the activations did grow
    grown = (recorder_wide - bare_wide) - (recorder - bare)
    widest = 4 * 16 * 49 * 4 * 48 * 4  # bytes by which the MLP's hidden activation grew
    assert grown < 0.25 * widest

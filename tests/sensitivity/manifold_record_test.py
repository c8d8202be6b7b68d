"""Recorded manifold signals: against whole activations in float64, their invariances, a kill."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mpqdiff import intercept, recipe
from mpqdiff import record as recording
from mpqdiff import sites as site_list
from mpqdiff.artifacts import chunked
from mpqdiff.denoiser import Prediction, from_linen
from mpqdiff.errors import InputError
from mpqdiff.quantize import activations, simulate
from mpqdiff.quantize.numerics import qmax
from mpqdiff.records import Statistics
from mpqdiff.sensitivity import SCORES, manifold, manifold_record, manifold_score, subspace

CHOICES = ((3, 8), (6, 8))
TIMESTEPS = np.array([90, 40, 3], np.int32)
SIGNALS = ("energy", "k", "features", "concentration", "rotate", "leak", "growth", "error")


@dataclass
class Case:
    """A network, its sites and supernet, and what it is called with."""

    denoise: Any
    params: Any
    sites: list
    net: Any
    x_ts: np.ndarray
    labels: np.ndarray
    table: Any
    lopsided: list
    legal: np.ndarray

    def record(self, **changes):
        given = {"x_ts": self.x_ts, "timesteps": TIMESTEPS, "legal": self.legal} | changes
        names = ("legal", "x_ts", "timesteps")
        legal, x_ts, timesteps = (given.pop(name) for name in names)
        return manifold_record.record(
            self.denoise,
            self.net,
            self.sites,
            CHOICES,
            legal,
            x_ts,
            timesteps,
            self.labels,
            **given,
        )

    def score(self, recorded=None, **readings):
        found = self.record() if recorded is None else recorded
        return SCORES["manifold"](found, self.sites, CHOICES, self.legal, **readings)


def case(module, params, x_ts, planned=None):
    """The Case of `module`, with the sites called `planned`, or all."""
    labels, shape = np.arange(x_ts.shape[1], dtype=np.int32) % 3, x_ts.shape[2:]
    denoise = from_linen(module)
    found, _ = site_list.list_sites(denoise, params, *site_list.example_inputs(shape))
    sites = [site for site in site_list.planned(found) if planned is None or site.path in planned]
    assert planned is None or len(sites) == len(planned)
    one = jax.jit(recording.one_timestep(denoise, sites, grams=False))
    taken = [one(params, x_t, t, labels) for x_t, t in zip(x_ts, TIMESTEPS, strict=True)]
    ranges = [np.stack([row[name] for row in taken]) for name in ("input_min", "input_max")]
    stats = Statistics(TIMESTEPS, *[np.zeros(0)] * 5, *ranges)
    a_bits = dict.fromkeys((site.path for site in sites), 8)
    table = activations.table(stats, sites, mode="step_table", a_bits=a_bits)
    flags = activations.lopsided(stats, sites)
    net = simulate.supernet(params, sites, CHOICES, {8: table}, flags, clip="absmax")
    legal = np.ones((len(sites), len(CHOICES)), bool)
    return Case(denoise, params, sites, net, x_ts, labels, table, flags, legal)


MODELS = {
    "dit": (
        dict(image_size=8, channels=1, patch=4, width=8, depth=1, num_heads=2, num_classes=3),
        ("t_embed/fc1", "block_0/adaln", "block_0/attn/qkv", "block_0/mlp/fc2"),
    ),
    "unet": (
        dict(image_size=8, channels=1, widths=(4, 8), blocks_per_level=1, attention_levels=(),
             num_heads=1, groups=2, embed_width=8, condition="label", num_classes=3,
             scale_shift=True),
        ("time/fc2", "conv_in", "down_0_resample", "down_1_res_0/shortcut", "conv_out"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    """(Case of a small model of ours with random weights, what is recorded of it)."""
    kwargs, planned = MODELS[request.param]
    module, params, _ = recipe.random_model(request.param, kwargs, 0)
    x_ts = np.random.default_rng(1).normal(size=(3, 6, 8, 8, 1)).astype(np.float32)
    own = case(module, params, x_ts, planned)
    return own, own.record(rotate=True)


def rounded(values, bits, scale):
    return np.clip(np.rint(values / scale), -qmax(bits), qmax(bits)) * scale


def quantised(own, index, w_bits, module, x, step):
    """The site's output in float64 from its rounded weights and inputs: no integer product."""
    path = own.sites[index].path
    flat = {key: np.asarray(leaf, np.float64) for key, leaf in traverse_util.flatten_dict(
        own.params, sep="/").items()}  # fmt: skip
    kernel, bias = flat[f"{path}/kernel"], flat.get(f"{path}/bias", 0.0)
    peak = np.abs(kernel).max(axis=tuple(range(kernel.ndim - 1)))
    weights = rounded(kernel, w_bits, peak / qmax(w_bits))
    column = activations.columns(own.sites)[path][0]
    scale = np.float64(own.table.scale[step, column])
    zero = np.float64(own.table.zero_point[step, column])
    inputs = (np.clip(np.rint(np.asarray(x, np.float64) / scale) + zero, -128, 127) - zero) * scale
    if own.sites[index].kind == "dense":
        return inputs @ weights + bias
    linear = module.clone(parent=None, name=None)
    with jax.enable_x64(True):
        leaves = {"kernel": jnp.asarray(weights)} | ({"bias": bias} if np.ndim(bias) else {})
        return np.asarray(linear.clone(dtype=jnp.float64).apply({"params": leaves}, inputs))


def captured(own):
    """({path: [(input, output) of each timestep]}, {path: module})."""
    modules = {}

    def keep(path, module, kind, args, out):
        modules[path] = module.clone(parent=None)
        return args[0], out

    run = jax.jit(lambda *call: intercept.observe(own.denoise, keep)(*call)[1])
    rows = [run(own.params, x_t, t, own.labels) for x_t, t in zip(own.x_ts, TIMESTEPS, strict=True)]
    return {path: [row[path] for row in rows] for path in rows[0]}, modules


def oracle(own, index, calls, module):
    """The site's signals, {name: number or [choices]}, of whole activations in float64."""
    inputs, outputs, others = [], [], {w: [] for w, _ in CHOICES}
    for step, (x, y) in enumerate(calls):
        inputs.append(np.asarray(x, np.float64).reshape(-1, x.shape[-1]))
        outputs.append(np.asarray(y, np.float64).reshape(-1, y.shape[-1]))
        for w, rows in others.items():
            other = quantised(own, index, w, module, x, step)
            rows.append(other.reshape(-1, y.shape[-1]))
    x, y = np.concatenate(inputs), np.concatenate(outputs)
    (x_mean, x_cov), (mean, cov) = moments(x), moments(y)
    directions, fed = subspace.principal(mean, cov), subspace.principal(x_mean, x_cov)
    found = {
        "energy": manifold.energy(x_mean, x_cov),
        "k": subspace.intrinsic_dimension(fed.values),
        "features": x.shape[1],
        "concentration": manifold.pca_concentration(directions),
        "leak": [],
        "growth": [],
        "error": [],
    }
    for w, rows in others.items():
        other = np.concatenate(rows)
        error = (other - y).T @ (other - y) / len(y)
        far, spread = moments(other)
        found["leak"].append(manifold.pca_leak(directions, error))
        found["growth"].append(manifold.growth([mean], [cov], [far], [spread])[0])
        found["error"].append(manifold.relative_error(mean, cov, error))
        if w == CHOICES[0][0]:
            found["rotate"] = manifold.pca_rotate(directions, subspace.principal(far, spread))
    return found


def moments(rows):
    return rows.mean(axis=0), np.cov(rows.T, bias=True).reshape(rows.shape[1], -1)


def test_recorded_signals_are_those_of_whole_activations(model):
    own, found = model
    calls, modules = captured(own)
    assert found["site"].tolist() == list(range(len(own.sites)))
    for index, site in enumerate(own.sites):
        expected = oracle(own, index, calls[site.path], modules[site.path])
        pairs = found["pair"][:, 0] == index
        for name in SIGNALS:
            value = found[name][pairs if name in ("leak", "growth", "error") else index]
            tolerance = {"rtol": 2e-3, "atol": 2e-5}
            np.testing.assert_allclose(value, expected[name], err_msg=site.path, **tolerance)


def test_the_transformer_has_a_site_of_more_features_than_rows(model):
    own, _ = model
    counts = {site.path: own.x_ts[:, :, 0, 0, 0].size for site in own.sites}
    rows = {site.path: counts[site.path] * site.macs // site.parameters for site in own.sites}
    fewer = [site.path for site in own.sites if rows[site.path] < site.shape[-1]]
    assert fewer == [site.path for site in own.sites if site.path.endswith("adaln")]


class Side(nn.Module):
    """Dense sites side by side on rows of features; the output is their sum."""

    features: tuple[int, ...]  # outputs of each

    @nn.compact
    def __call__(self, x_t, t, label):
        rows = x_t[..., 0]  # [N,P,D]
        outputs = [
            nn.Dense(d, use_bias=False, name=f"s{i}")(rows) for i, d in enumerate(self.features)
        ]
        return Prediction(x_t + sum(out.mean() for out in outputs))


def side(kernels, rows):
    """The Case of `kernels` [D,D'], all fed with rows [T,N,P,D]."""
    params = {f"s{i}": {"kernel": np.asarray(k, np.float32)} for i, k in enumerate(kernels)}
    module = Side(tuple(np.shape(k)[1] for k in kernels))
    return case(module, params, np.asarray(rows, np.float32)[..., None])


def drawn(seed, shape=(3, 6, 40, 8), sites=4):
    rng = np.random.default_rng(seed)
    kernels = rng.normal(size=(sites, shape[-1], 8)) * 0.7 ** np.arange(8)
    return rng, rng.normal(size=shape), kernels


@pytest.mark.parametrize("seed", range(3))
def test_a_rotation_of_the_features_changes_no_signal_of_the_float_model(seed):
    rng, rows, kernels = drawn(seed)
    rows = rows * 0.8 ** np.arange(8) + rng.normal(size=8)
    turns = [np.linalg.qr(rng.normal(size=(8, 8)))[0] for _ in range(2)]
    plain = side(kernels, rows).record()
    turned = side([turns[0].T @ k @ turns[1] for k in kernels], rows @ turns[0]).record()
    np.testing.assert_array_equal(turned["k"], plain["k"])
    for name in ("energy", "concentration"):
        np.testing.assert_allclose(turned[name], plain[name], rtol=1e-4)
    assert not np.allclose(turned["leak"], plain["leak"], rtol=1e-4)  # the grids are not turned


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_rank_r_inputs_have_no_more_than_r_dimensions(rank):
    rng, rows, kernels = drawn(rank)
    low = rows[..., :rank] @ rng.normal(size=(rank, 8)) + rng.normal(size=8)
    assert (side(kernels, low).record()["k"] <= rank).all()


def test_white_noise_fills_its_features():
    _, rows, kernels = drawn(0, shape=(3, 6, 200, 8))
    found = side(kernels, rows).record()
    assert (found["k"] / found["features"] >= 0.9).all()
    np.testing.assert_allclose(found["energy"], np.log10(8), atol=0.02)


@pytest.mark.parametrize("pca", manifold_score.PCA)
def test_a_common_scale_changes_no_score_by_rank(pca):
    _, rows, kernels = drawn(1)
    one, other = side(kernels, rows), side(2.0 * kernels, 4.0 * rows)
    found = [each.record(rotate=True) for each in (one, other)]
    plain, scaled = (
        each.score(given, pca=pca) for each, given in zip((one, other), found, strict=True)
    )
    np.testing.assert_allclose(scaled.value, plain.value, rtol=1e-5)
    np.testing.assert_allclose(found[1]["energy"] - found[0]["energy"], 2 * np.log10(4), rtol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_a_planted_fragile_site_is_first(seed):
    # One row of large weights, on a feature that says little, sets every column's step.
    _, rows, kernels = drawn(seed)
    rows[..., 0] *= 1e-3
    kernels[2, 0] = 40.0
    own = side(kernels, rows)
    found = own.record(rotate=True)
    for pca in ("leak", "rotate"):
        assert np.argmax(manifold_score.signals(found, pca=pca)["pca"]) == 2
        value = np.asarray(own.score(found, pca=pca).value)[0, :, 0]
        assert np.argmax(value) == 2 and value[2] > 5 * np.delete(value, 2).max()


def test_the_score_is_the_combination_times_the_error(model):
    own, found = model
    for name in ("energy", "pca", "dimension", "growth"):
        weights = {each: float(each == name) for each in ("energy", "pca", "dimension", "growth")}
        signals = manifold_score.signals(found, weights=weights, normalisation="min_max")
        signal = np.asarray(signals[name])
        expected = (signal - signal.min()) / np.ptp(signal)
        np.testing.assert_allclose(signals["combined"], expected, atol=1e-12)
        scores = own.score(found, weights=weights, normalisation="min_max")
        assert (scores.kind, scores.name) == ("damage", "manifold")
        value = np.asarray(scores.value)
        assert value.shape == (1, len(own.sites), len(CHOICES))
        errors = found["error"].reshape(-1, 2)
        np.testing.assert_allclose(value[0, found["site"]], expected[:, None] * errors, rtol=1e-6)


def test_a_kill_in_any_pass_and_any_group_resumes_to_the_same(tmp_path):
    _, rows, kernels = drawn(2)
    own = side(kernels, rows)
    memory = 2.5 * 2 * 64 * manifold_record.BYTES_PER_MOMENT / 2**30  # of two sites and a half
    whole = own.record(rotate=True)
    computed = []

    def stopping(stop):
        """Chunks on disk, and a kill before the chunk `stop`."""

        def chunks(name):
            def run(count, compute):
                def one(index):
                    if (name, index) == stop:
                        raise KeyboardInterrupt
                    computed.append((name, index))
                    return compute(index)

                return chunked(tmp_path, name, quiet=True)(count, one)

            return run

        return chunks

    arguments = {"rotate": True, "memory_gb": memory}
    for stop in (("directions_0", 0), ("errors_0", 1), ("rotate_1", 0)):
        with pytest.raises(KeyboardInterrupt):
            own.record(**arguments, chunks=stopping(stop))
    found = own.record(**arguments, chunks=stopping(None))
    assert len(computed) == len(set(computed)) == 2 * (1 + len(TIMESTEPS) + 1)
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-9, err_msg=name)


def test_positions_are_sampled_alike_in_every_pass():
    rng, rows, kernels = drawn(4, shape=(3, 6, 200, 8))
    rows = rows * 0.8 ** np.arange(8) + rng.normal(size=8)
    own = side(kernels, rows)
    all_rows, some = own.record(), own.record(rows=6 * 100)
    assert not np.array_equal(some["energy"], all_rows["energy"])
    for name in ("energy", "leak", "error"):
        np.testing.assert_allclose(some[name], all_rows[name], rtol=0.15, err_msg=name)
    # Without error nothing moves: both passes must have read the same positions.
    exact = side(np.sign(kernels), np.sign(rows)).record(rows=6 * 3)
    assert exact["error"].max() < 1e-9 and not exact["growth"].any()


def test_what_cannot_be_recorded_or_scored():
    _, rows, kernels = drawn(0)
    own = side(kernels, rows)
    with pytest.raises(InputError, match="inputs of site 's0': all 8 features are constant"):
        own.record(x_ts=np.ones_like(own.x_ts))
    with pytest.raises(InputError, match="inputs of site 's0': NaN or infinity"):
        own.record(x_ts=own.x_ts * np.nan)
    silent = side([kernels[0], 0 * kernels[1]], rows)
    with pytest.raises(InputError, match="outputs of site 's1': all 8 features are constant"):
        silent.record()
    with pytest.raises(InputError, match="rows=0: expected 1 or more"):
        own.record(rows=0)
    with pytest.raises(InputError, match=r"at timesteps of \(2,\)"):
        own.record(timesteps=TIMESTEPS[:2])
    found = own.record()
    with pytest.raises(InputError, match="pca='rotate' was not recorded"):
        own.score(found, pca="rotate")
    with pytest.raises(InputError, match="unknown PCA sensitivity"):
        own.score(found, pca="angle")
    own.legal = own.legal & [[True, False], *[[True, True]] * 3]
    with pytest.raises(InputError, match="other sites or choices"):
        own.score(found)
    own.legal[:, 1] = False
    nothing = own.record()
    assert nothing["site"].size == 0
    assert not np.asarray(own.score(nothing).value).any()

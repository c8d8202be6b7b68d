"""Every damage score against the integer model of the plan that quantises one site alone."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff import intercept
from mpqdiff.artifacts import chunked
from mpqdiff.denoiser import Prediction
from mpqdiff.diffusion.samplers import ddim
from mpqdiff.diffusion.schedule import alphas_cumprod
from mpqdiff.errors import InputError
from mpqdiff.kernels.quantized_matmul import quantized_matmul
from mpqdiff.quantize import apply, backends
from mpqdiff.sensitivity import SCORES, damage, eps_error, random

FLOAT = 3  # the place of float among the choices
KAPPA = np.array([0.5, 2.0, 1.0])


def sampler(denoise):
    """Two noisy steps, written out: what a score needs of one is its signature."""

    def run(params, x_T, labels, keys):
        x = x_T
        for step, t in enumerate((90, 40)):
            noise = jax.vmap(lambda key: jax.random.normal(key, x_T.shape[1:]))(keys)
            x = 0.9 * x - 0.3 * denoise(params, x, np.int32(t), labels).eps + 0.1 * step * noise
        return x

    return run


def rollout_inputs(small):
    keys = jax.vmap(jax.random.key)(jnp.arange(6))
    return jnp.asarray(small.x_ts[0]), small.labels, keys


def score(small, name, legal=None, **changes):
    """The score called `name` of the small network."""
    first = (small.net, small.sites, small.choices, small.legal if legal is None else legal)
    inputs = small.x_ts, small.timesteps, small.labels
    if name == "weight_error":
        return SCORES[name](*first)
    if name == "rollout_error":
        inputs, changes = (sampler, *rollout_inputs(small)), {"steps": 2, **changes}
    if name == "eps_error":
        changes = {"weights": KAPPA, **changes}
    return SCORES[name](small.denoise, *first, *inputs, **changes)


DAMAGES = ("weight_error", "output_error", "eps_error", "rollout_error")


@dataclass
class Run:
    """A score with monotone switched off, so that every entry is what was measured."""

    value: np.ndarray
    traces: int = 0  # of the denoiser
    images: int = 0  # that it was evaluated on
    chunks: int = 0


@pytest.fixture(scope="module")
def measured(small):
    """{name: Run} of every damage score."""
    runs = {name: Run(np.zeros(0)) for name in DAMAGES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(damage, "monotone", lambda value, choices, legal: (value, 0))
        for name, run in runs.items():

            def counted(params, x_t, t, cond, run=run):
                def evaluated():
                    run.images += len(x_t)

                run.traces += 1
                jax.debug.callback(evaluated)
                return small.denoise(params, x_t, t, cond)

            def chunks(count, compute, run=run):
                run.chunks = count
                return damage.in_memory(count, compute)

            changes = {} if name == "weight_error" else {"chunks": chunks}
            run.value = np.asarray(score(replace(small, denoise=counted), name, **changes).value)
            jax.effects_barrier()
    return runs


def squares(a, b):
    return float(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2))


def weight_oracle(small, index, choice):
    params, _ = small.integer(index, choice)
    site = small.sites[index]
    if site.kind == "product":
        return [0.0]
    w, _ = small.choices[choice]
    rounded = apply.dequantized(small.params[site.path]["kernel"], w)
    assert params["sites"][site.path]["scale"].shape == rounded.shape[-1:]
    return [np.sum((np.asarray(rounded) - small.params[site.path]["kernel"]) ** 2)]


def output_errors(small, index, choice, captured):
    """The site's own output in the integer model, caught at its product, against the float's."""
    site, rows, caught = small.sites[index], [], []

    def matmul(*operands, x_bits):
        caught.append(quantized_matmul(*operands, x_bits=x_bits))
        return caught[-1]

    with pytest.MonkeyPatch.context() as patch:
        backend = (*backends._kernels_backend()[:2], matmul)
        patch.setitem(backends.BACKENDS, "catching", lambda: backend)
        params, denoise = small.integer(index, choice, backend="catching")
    bias = small.params.get(site.path, {}).get("bias", 0.0)
    for (args, out), x_t, t in zip(captured[site.path], small.x_ts, small.timesteps, strict=True):
        if site.kind == "product":
            limit = 2 ** (small.choices[choice][1] - 1) - 1
            column = list(range(index, index + 2))
            scales = np.asarray(params["steps"].scale)[small.timesteps.tolist().index(t), column]
            lhs, rhs = (
                np.clip(np.rint(np.asarray(x, np.float64) / s), -limit - 1, limit) * s
                for x, s in zip(args, scales, strict=True)
            )
            quantised = np.einsum("bpq,bqd->bpd", lhs, rhs)
        else:
            denoise(params, x_t, t, small.labels)
            (quantised,) = caught
            caught.clear()
        rows.append(squares(quantised, out) / np.mean((np.asarray(out) - bias) ** 2))
    return rows


def eps_oracle(small, index, choice):
    params, denoise = small.integer(index, choice)
    return [
        k**2
        * squares(
            denoise(params, x_t, t, small.labels).eps,
            small.denoise(small.params, x_t, t, small.labels).eps,
        )
        for k, x_t, t in zip(KAPPA, small.x_ts, small.timesteps, strict=True)
    ]


def rollout_oracle(small, index, choice):
    params, denoise = small.integer(index, choice)
    inputs = rollout_inputs(small)
    return [
        squares(sampler(denoise)(params, *inputs), sampler(small.denoise)(small.params, *inputs))
    ]


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_that_of_the_integer_model_of_one_site(small, measured, name):
    observed = intercept.observe(small.denoise, lambda path, module, kind, args, out: (args, out))
    rows = [
        observed(small.params, x_t, t, small.labels)[1]
        for x_t, t in zip(small.x_ts, small.timesteps, strict=True)
    ]
    captured = {path: [row[path] for row in rows] for path in rows[0]}

    def output_oracle(small, index, choice):
        return output_errors(small, index, choice, captured)

    oracle = {
        "weight_error": weight_oracle,
        "output_error": output_oracle,
        "eps_error": eps_oracle,
        "rollout_error": rollout_oracle,
    }[name]
    found = measured[name].value
    once = name in ("weight_error", "rollout_error")
    assert found.shape == (1 if once else 3, len(small.sites), len(small.choices))
    for index, site in enumerate(small.sites):
        for choice in range(FLOAT):
            expected = oracle(small, index, choice)
            np.testing.assert_allclose(
                found[:, index, choice],
                expected,
                rtol=2e-3,
                atol=1e-12,
                err_msg=f"{site.path} at {small.choices[choice]}",
            )


@pytest.mark.parametrize("name", DAMAGES)
def test_float_costs_nothing_and_bits_help(small, measured, name):
    value = measured[name].value
    assert not value[..., FLOAT].any()
    live = [i for i, site in enumerate(small.sites) if site.path not in ("dead", "mix")]
    assert (value[:, live, 0] > 2 * value[:, live, 2]).all() and (value[:, live, 2] > 0).all()
    mix = value[:, small.index("mix")]
    np.testing.assert_array_equal(mix[:, 1], mix[:, 2])  # a product has no weights
    assert (mix[:, 0] > 2 * mix[:, 1]).all() or name == "weight_error"


@pytest.mark.parametrize("name", ["eps_error", "rollout_error"])
def test_what_nothing_reads_has_no_damage_at_all(small, measured, name):
    value = measured[name].value
    assert not value[:, small.index("dead")].any()
    assert measured["output_error"].value[:, small.index("dead"), :FLOAT].min() > 0


def test_weight_error_is_blind_to_activations(small, measured):
    value = measured["weight_error"].value
    np.testing.assert_array_equal(value[..., 0], value[..., 1])
    assert (measured["output_error"].value[:, 0, 0] > measured["output_error"].value[:, 0, 1]).all()


@pytest.mark.parametrize("name", DAMAGES[:-1])
def test_only_what_is_to_be_decided_is_measured(small, measured, name):
    legal = small.legal
    legal[0] = np.arange(4) == 2  # pinned
    legal[3, 1] = False
    value = np.asarray(score(small, name, legal).value)
    expected = np.where(legal & (legal.sum(1) > 1)[:, None], measured[name].value, 0)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    pinned = small.legal & (np.arange(4) == 1)
    assert not np.asarray(score(small, name, pinned).value).any()


@pytest.mark.parametrize("name", ["output_error", "eps_error"])
def test_an_interrupted_score_goes_on_where_it_was(small, measured, name, tmp_path, monkeypatch):
    monkeypatch.setattr(damage, "MACS_PER_CHUNK", 1)
    done = []

    def interrupted(count, compute):
        def once(index):
            if len(done) == 2:
                raise KeyboardInterrupt
            done.append(index)
            return compute(index)

        return chunked(tmp_path, name, quiet=True)(count, once)

    with pytest.raises(KeyboardInterrupt):
        score(small, name, chunks=interrupted)

    def resumed(count, compute):
        def noted(index):
            done.append(index)
            return compute(index)

        return chunked(tmp_path, name, quiet=True)(count, noted)

    value = score(small, name, chunks=resumed)
    pairs = damage.measured(small.sites, small.choices, small.legal)
    assert done == list(range(3 if name == "output_error" else len(pairs)))
    whole, _ = damage.monotone(measured[name].value, small.choices, small.legal)
    np.testing.assert_allclose(value.value, whole, rtol=1e-5)


@pytest.mark.parametrize("name", ["eps_error", "rollout_error"])
def test_one_trace_serves_every_pair_and_the_preview_counts_the_images(small, measured, name):
    run = measured[name]
    assert run.traces == (1 if name == "eps_error" else 2)  # the sampler's steps are unrolled
    expected = damage.evaluations(name, small.sites, small.choices, 3, 6, 2)
    assert run.images == expected
    assert run.chunks == 1


def test_kappa_is_what_an_error_of_eps_adds_to_the_next_x():
    abar, steps = alphas_cumprod("linear", 1000), np.array([900, 500, 100, 0], np.int32)
    x_T = jnp.ones((1, 2, 2, 1))

    def run(at):
        def denoise(params, x_t, t, cond):
            del params, cond
            return Prediction(0.1 * x_t + jnp.where(t == at, 0.01, 0.0))

        x_0, x_ts = ddim(
            denoise,
            {},
            x_T,
            None,
            timesteps=steps,
            alphas_cumprod=abar,
            clip=False,
            trajectory=True,
        )
        return np.append(np.asarray(x_ts)[:, 0, 0, 0, 0], x_0[0, 0, 0, 0])

    kappa = eps_error.kappa(abar, steps)
    for place, t in enumerate(steps):
        moved = run(t)[place + 1] - run(-1)[place + 1]
        np.testing.assert_allclose(moved, 0.01 * kappa[place], rtol=2e-2, atol=1e-6)


def test_bad_input_is_named(small):
    nan = {**small.net, "float": jax.tree.map(lambda leaf: leaf * jnp.nan, small.net["float"])}
    arguments = small.sites, small.choices, small.legal
    with pytest.raises(InputError, match="weights of site 'conv' are not finite"):
        SCORES["weight_error"](nan, *arguments)
    inputs = small.x_ts * np.nan, small.timesteps, small.labels
    with pytest.raises(InputError, match=r"eps_error of site 'conv' at \(3, 4\) bits is not fin"):
        SCORES["eps_error"](small.denoise, small.net, *arguments, *inputs)
    for name in ("output_error", "eps_error"):
        with pytest.raises(InputError, match=r"x_ts of \(3, 6, 4, 4, 1\) at timesteps of \(2,\)"):
            SCORES[name](
                small.denoise, small.net, *arguments, small.x_ts, small.timesteps[:2], small.labels
            )
    with pytest.raises(InputError, match="expected 3 finite numbers"):
        score(small, "eps_error", weights=[1.0])


def test_random_differs_by_site_and_key_but_not_by_timestep():
    one, again = (random.score(jax.random.key(1), 5, 40).value for _ in range(2))
    other = random.score(jax.random.key(2), 5, 40).value
    np.testing.assert_array_equal(one, again)
    np.testing.assert_array_equal(one, np.broadcast_to(one[0], (5, 40)))
    assert len(np.unique(one)) == 40
    assert not np.array_equal(one, other)
    assert one.min() >= 0
    assert one.max() < 1


def test_registry_names_its_scores():
    assert set(SCORES) == {"orthogonality", "manifold", "random", *DAMAGES}
    assert SCORES["random"](jax.random.key(0), 2, 3).name == "random"

"""Simulated against integer: the same int32 accumulators, one compile for every site and plan."""

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff import sites as site_list
from mpqdiff.denoiser import Prediction, from_linen
from mpqdiff.errors import InputError
from mpqdiff.kernels.quantized_matmul import quantized_matmul, xla
from mpqdiff.quantize import activations, apply, backends, simulate
from mpqdiff.quantize.numerics import quantize_activation, quantize_weight

CHOICES = ((4, 6), (3, 8), (4, 8), (8, 8), (32, 32))
FLOAT = CHOICES.index((32, 32))
T = np.int32(500)


def plan_of(tiny, taken, *, mode="step_table", products=False):
    """The Plan in which site i takes CHOICES[taken[i]]."""
    sites = tiny.sites(products=products)
    pairs = {s.path: CHOICES[k] for s, k in zip(sites, taken, strict=True) if k < FLOAT}
    w_bits, a_bits = dict.fromkeys((s.path for s in tiny.every), None), {}
    for site in tiny.every:
        w, a = pairs.get(site.path, (None, None))
        w_bits[site.path] = w if site.parameters else None
        a_bits[site.path] = {"lhs": a, "rhs": a} if site.kind == "product" else a
    return replace(tiny.plan(mode=mode, products=products), w_bits=w_bits, a_bits=a_bits)


def supernet(tiny, *, mode="step_table", products=False, choices=CHOICES, clip="mse"):
    sites = tiny.sites(products=products)
    stats = tiny.statistics(sites)
    tables = {
        a: activations.table(
            stats,
            sites,
            mode=mode,
            a_bits={s.path: {"lhs": a, "rhs": a} if s.kind == "product" else a for s in sites},
        )
        for a in (6, 8)
    }
    flags = activations.lopsided(stats, sites)
    if mode == "online":
        flags = [False] * len(sites)
    return simulate.supernet(tiny.params, sites, choices, tables, flags, clip=clip)


def integer(tiny, taken, *, mode="step_table", products=False):
    """The integer model of the same plan, through `apply`."""
    sites, plan = tiny.sites(products=products), plan_of(tiny, taken, mode=mode, products=products)
    stats = tiny.statistics(sites)
    table = activations.table(stats, sites, mode=mode, a_bits=plan.a_bits)
    flags = [False] * len(sites) if mode == "online" else activations.lopsided(stats, sites)
    tensors = apply.quantize(tiny.params, sites, plan, table, flags)
    return apply.build(tiny.denoise, tiny.params, sites, plan, tensors, table)


class Listening:
    """`quantized_matmul` that reports the accumulator of each product to the host, in order."""

    def __init__(self):
        self.heard = []

    def __call__(self, x, weight, x_scale, zero, w_scale, colsum, bias, *, x_bits):
        xq = quantize_activation(x, x_scale, 0 if zero is None else zero, x_bits)
        accumulator = xla.accumulate(xq, weight)
        jax.debug.callback(lambda a: self.heard.append(np.asarray(a)), accumulator, ordered=True)
        return quantized_matmul(x, weight, x_scale, zero, w_scale, colsum, bias, x_bits=x_bits)

    def run(self, denoise, params, tiny):
        """(eps, accumulators) of one call."""
        self.heard.clear()
        eps = denoise(params, tiny.inputs[0], T, tiny.inputs[1]).eps
        jax.effects_barrier()
        return np.asarray(eps), list(self.heard)


def plans(tiny):
    """Choices per site: all alike, mixed widths of both kinds, and a mix with float."""
    count = len(tiny.sites())
    return [np.full(count, 3), np.arange(count) % FLOAT, np.arange(count)[::-1] % len(CHOICES)]


@pytest.fixture(scope="module")
def compared(tiny):
    """([(integer, simulated)] of (eps, accumulators) per plan, how often the latter was traced)."""
    listening, traces = Listening(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate, "quantized_matmul", listening)
        backend = (*backends._kernels_backend()[:2], listening)
        patch.setitem(backends.BACKENDS, "kernels", lambda: backend)
        sites = tiny.sites()
        net, denoise = supernet(tiny), simulate.simulated_denoise(tiny.denoise, sites, CHOICES)

        @jax.jit
        def counted(*call):
            traces.append(1)
            return denoise(*call)

        pairs = []
        for taken in plans(tiny):
            model = integer(tiny, taken)
            one = listening.run(jax.jit(model.denoise), model.params, tiny)
            choice = jnp.asarray(taken, jnp.int32)
            pairs.append((one, listening.run(counted, {**net, "choice": choice}, tiny)))
    return pairs, len(traces)


def test_accumulators_are_equal_and_outputs_within_a_thousandth(compared, tiny):
    for ((eps, accumulators), (other_eps, others)), taken in zip(
        compared[0], plans(tiny), strict=True
    ):
        assert len(accumulators) == len(others) == (taken != FLOAT).sum() > 3
        for one, other in zip(accumulators, others, strict=True):
            assert one.dtype == other.dtype == np.int32
            np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(other_eps, eps, atol=1e-3, rtol=0)


def test_plans_differ_in_what_they_compute(compared):
    outputs = [simulated[0] for _, simulated in compared[0]]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert np.abs(one - other).max() > 1e-2


def test_one_trace_serves_all_plans(compared):
    assert compared[1] == 1


@pytest.mark.parametrize("mode", ["step_table", "online"])
def test_products_and_online_scales_agree_with_the_integer_path(tiny, mode):
    sites = tiny.sites(products=True)
    net = supernet(tiny, mode=mode, products=True)
    denoise = jax.jit(simulate.simulated_denoise(tiny.denoise, sites, CHOICES))
    x_t, labels = tiny.inputs
    t = np.array([900, 500, 30, 30], np.int32) if mode == "step_table" else T  # a row per sample
    taken = np.arange(len(sites), dtype=np.int32) % FLOAT
    model = integer(tiny, taken, mode=mode, products=True)
    expected = jax.jit(model.denoise)(model.params, x_t, t, labels).eps
    found = denoise({**net, "choice": taken}, x_t, t, labels).eps
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=0)


def test_float_everywhere_is_the_float_model(tiny):
    sites = tiny.sites(products=True)
    denoise = jax.jit(simulate.simulated_denoise(tiny.denoise, sites, CHOICES))
    net, one_past = supernet(tiny, products=True), simulate.all_float(sites, CHOICES)
    for choice in (one_past, np.full(len(sites), FLOAT, np.int32)):
        found = denoise({**net, "choice": choice}, tiny.inputs[0], T, tiny.inputs[1]).eps
        np.testing.assert_array_equal(found, tiny.float_eps(T))
    np.testing.assert_array_equal(one_past, len(CHOICES))


def test_one_site_changes_that_site_alone(tiny):
    sites = tiny.sites()
    taken = simulate.one_site(sites, CHOICES, 2, 1)
    assert taken.tolist() == [len(CHOICES)] * 2 + [1] + [len(CHOICES)] * (len(sites) - 3)


def test_the_supernet_holds_what_the_quantiser_gives(tiny):
    net = supernet(tiny, clip="absmax")
    for site in tiny.sites()[:3]:
        held, kernel = net["sites"][site.path], tiny.params
        for name in site.path.split("/"):
            kernel = kernel[name]
        assert held["qvalue"].dtype == jnp.int8 and len(held["qvalue"]) == 3
        for place, bits in enumerate((3, 4, 8)):
            qvalue, scale = quantize_weight(kernel["kernel"], bits, clip="absmax")
            np.testing.assert_array_equal(held["qvalue"][place].reshape(qvalue.shape), qvalue)
            np.testing.assert_array_equal(held["scale"][place], scale)


class Mixed(nn.Module):
    """A grouped convolution, which has no integer form, and a bfloat16 Dense that reads it."""

    @nn.compact
    def __call__(self, x_t, t, label):
        x = nn.Conv(4, (1, 1), feature_group_count=2, name="grouped")(x_t)
        return Prediction(nn.Dense(2, dtype=jnp.bfloat16, name="half")(x))


def test_sites_left_out_need_no_integer_form_and_the_type_is_the_models():
    x_t = jax.random.normal(jax.random.key(1), (2, 2, 2, 2))
    labels, module, t = np.zeros(2, np.int32), Mixed(), jnp.int32(T)
    params = module.init(jax.random.key(0), x_t, t, labels)["params"]
    denoise, choices = from_linen(module), [(8, 8)]
    sites, _ = site_list.list_sites(denoise, params, *site_list.example_inputs((2, 2, 2)))
    table = activations.Table(*(jnp.asarray(v) for v in ([T], [[3e-2] * 2], [[0] * 2])))
    net = simulate.supernet(params, sites, choices, {8: table}, [False, False])
    run = partial(simulate.simulated_denoise, denoise, sites, choices)
    choice = {**net, "choice": np.array([1, 0], np.int32)}
    expected = denoise(params, x_t, t, labels).eps
    found = jax.jit(run(only={1}))(choice, x_t, t, labels).eps
    assert found.dtype == expected.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), atol=0.05)
    assert (found != expected).any()
    with pytest.raises(InputError, match="grouped"):
        jax.jit(run())(choice, x_t, t, labels)


@pytest.mark.parametrize("bad", [(), ((32, 32),), ((4, 32),), ((9, 8), (8, 8)), ((4, 1),)])
def test_choices_that_no_site_can_take_are_refused(tiny, bad):
    with pytest.raises(InputError, match=r"expected pairs \(w_bits, a_bits\)"):
        supernet(tiny, choices=bad)


def test_a_missing_table_is_named(tiny):
    with pytest.raises(InputError, match=r"no activation table for \[5\] bits; got .*\[6, 8\]"):
        supernet(tiny, choices=((4, 5), (4, 8)))

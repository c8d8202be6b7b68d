"""The selectors by name, the controls, and the ordering on an exact denoiser."""

import jax
import numpy as np
import pytest

from mpqdiff import timesteps
from mpqdiff.diffusion.ddim import ddim
from mpqdiff.diffusion.samplers import log_snr_timesteps, uniform_timesteps
from mpqdiff.diffusion.schedule import alphas_cumprod
from mpqdiff.errors import InputError
from mpqdiff.timesteps.gram import record_gram

ABAR = alphas_cumprod("linear", 60)
EVIDENCE = {
    "drift": {"drift": np.linspace(1, 2, 60), "tail": 0.0},
    "drift_edges": {"gram": np.eye(60), "tail": 0.0},
    "shortest_path": {"gram": np.eye(60)},
}


@pytest.mark.parametrize("name", timesteps.SELECTORS)
def test_every_selector_gives_that_many_descending_steps(name):
    for count in (1, 2, 7, 59, 60):
        steps = timesteps.select(ABAR, count, name, **EVIDENCE.get(name, {}))
        assert steps.dtype == np.int32 and len(steps) == count and steps[0] == 59
        assert (np.diff(steps) < 0).all()
    for count in (0, 61):
        with pytest.raises(InputError, match=f"num_steps={count}"):
            timesteps.select(ABAR, count, name, **EVIDENCE.get(name, {}))


def test_controls_are_the_samplers_own():
    even = timesteps.select(ABAR, 7)
    np.testing.assert_array_equal(even, uniform_timesteps(60, 7))
    np.testing.assert_array_equal(timesteps.select(ABAR, 7, "log_snr"), log_snr_timesteps(ABAR, 7))


def test_quadratic_steps_have_even_square_roots():
    abar = alphas_cumprod("linear", 1000)
    steps = timesteps.select(abar, 11, "quadratic")
    np.testing.assert_array_equal(steps, np.rint(999 * np.linspace(1, 0, 11) ** 2))
    part = timesteps.select(abar, 11, "quadratic", reach=0.8)
    np.testing.assert_array_equal(part, np.rint(799.2 * np.linspace(1, 0, 11) ** 2))
    for reach in (0.0, 1.01, np.nan):
        with pytest.raises(InputError, match="reach="):
            timesteps.select(abar, 11, "quadratic", reach=reach)


@pytest.mark.parametrize("reach", [0.3, 0.8, 1.0])
def test_quadratic_steps_are_distinct_for_every_count(reach):
    for count in range(1, 61):
        steps = timesteps.select(ABAR, count, "quadratic", reach=reach)
        assert len(steps) == count and (np.diff(steps) < 0).all()
        assert steps[-1] >= 0 and steps[0] <= max(np.rint(reach * 59), count - 1)


def test_names_and_arguments():
    assert timesteps.arguments("shortest_path")["gram"] is True
    assert timesteps.arguments("shortest_path")["tail"] is False
    assert timesteps.arguments("uniform") == {}
    with pytest.raises(InputError, match="unknown selection of timesteps 'x'; known: drift"):
        timesteps.select(ABAR, 5, "x")
    for name, given in [("shortest_path", {}), ("uniform", {"gram": 1}), ("drift", {"tail": 0.1})]:
        with pytest.raises(InputError, match=f"selector '{name}' got arguments"):
            timesteps.select(ABAR, 5, name, **given)


def test_on_an_exact_denoiser_the_order_of_the_selectors_is_as_expected(make_mixture):
    denoise, abar = make_mixture(1000)
    recorded = jax.random.normal(jax.random.key(0), (64, 1, 1, 8))
    fresh = jax.random.normal(jax.random.key(1), (2000, 1, 1, 8))
    gram = record_gram(denoise, 1.0, recorded, None, alphas_cumprod=abar, clip=False)

    def sample(steps):
        return ddim(denoise, 1.0, fresh, None, timesteps=steps, alphas_cumprod=abar, clip=False)

    teacher = sample(np.arange(1000)[::-1])

    def distance(count, name, **given):
        x_0 = sample(timesteps.select(abar, count, name, **given))
        off = np.linalg.norm(np.asarray(x_0 - teacher).reshape(2000, -1), axis=1)
        return np.sort(off)[:1900].mean()  # a few end in another Gaussian and would decide alone

    floor = [distance(count, "quadratic", reach=0.8) for count in (100, 250)]
    assert floor[1] > 0.5 * floor[0]  # it begins with noise of another timestep: steps do not help
    for count in (10, 50):
        exact = distance(count, "shortest_path", gram=gram)
        greedy = distance(count, "drift_edges", gram=gram, tail=0.0)
        quadratic, even = distance(count, "quadratic"), distance(count, "uniform")
        assert exact < 1.01 * greedy and max(exact, greedy) < quadratic < even, count
        assert exact < 0.75 * even, count

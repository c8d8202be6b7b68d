"""Agreement with diffusers' schedulers: schedules, steps and paths, on one analytic denoiser.

Skipped where torch or diffusers is absent.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff.denoiser import Prediction
from mpqdiff.diffusion.process import predict_eps
from mpqdiff.diffusion.samplers import SAMPLERS, step_keys, uniform_timesteps
from mpqdiff.diffusion.schedule import SCHEDULES, alphas_cumprod
from mpqdiff.diffusion.steps import step_noise

torch = pytest.importorskip("torch", reason="the agreement tests run diffusers on torch")
diffusers = pytest.importorskip("diffusers", reason="the agreement tests run its schedulers")
scheduling_ddpm = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")

F = 1000
OPTIONS = {
    "linear": {"beta_schedule": "linear"},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
TYPES = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}
MEAN, SPREAD = 0.3, 0.6
EVEN, UNEVEN = list(range(900, -1, -100)), [930, 880, 700, 500, 260, 90, 30, 0]
HARD = [999, 940, 400, 90, 3, 2, 0]  # the ends of the schedule, where float32 tables are coarse


def noise(seed=0):
    return np.random.default_rng(seed).normal(size=(2, 4, 4, 3)).astype(np.float32)


def answer(x_t, a, prediction_type):
    """The exact eps, x_0 or v of data N(MEAN, SPREAD) at signal `a`; NumPy, torch and JAX alike."""
    eps = (1 - a) ** 0.5 * (x_t - a**0.5 * MEAN) / (a * SPREAD + 1 - a)
    x_0 = (x_t - (1 - a) ** 0.5 * eps) / a**0.5
    return {"eps": eps, "x_0": x_0, "v": a**0.5 * eps - (1 - a) ** 0.5 * x_0}[prediction_type]


def ours(name, abar, timesteps, *, prediction_type="eps", **options):
    table = jnp.asarray(abar)

    def network(params, x_t, t, cond):
        return Prediction(answer(x_t, table[t], prediction_type), jnp.sin(2.0 * x_t))

    x_T = jnp.asarray(noise(), table.dtype)
    keys = step_keys(0, 0, len(x_T))
    out = SAMPLERS[name](
        predict_eps(network, prediction_type, table),
        None,
        x_T,
        None,
        timesteps=np.array(timesteps),
        alphas_cumprod=abar,
        keys=keys,
        **options,
    )
    draws = [np.asarray(step_noise(keys, index, x_T)) for index in range(len(timesteps))]
    return np.asarray(out), draws


def theirs(scheduler, abar, timesteps, *, prediction_type="eps", learned=False, step=None):
    """diffusers' loop over `timesteps`; `step(index)` gives what its `step` takes besides."""
    x = torch.tensor(noise().astype(abar.dtype)).permute(0, 3, 1, 2)
    assert scheduler.timesteps.tolist() == list(timesteps)
    for index, t in enumerate(scheduler.timesteps):
        out = answer(x, torch.tensor(abar)[int(t)], prediction_type)
        if learned:
            out = torch.cat([out, torch.sin(2.0 * x)], dim=1)
        x = scheduler.step(out, t, x, **(step(index) if step else {})).prev_sample
    return x.permute(0, 2, 3, 1).numpy()


def channels_first(draw):
    return torch.tensor(np.moveaxis(draw, -1, 1))


def with_table(scheduler, abar, timesteps):
    """The scheduler on our table in float64, so that nothing but the method is compared."""
    scheduler.alphas_cumprod = torch.tensor(abar)
    if timesteps is not None:
        scheduler.set_timesteps(timesteps=timesteps)
    if hasattr(scheduler, "sigmas"):
        kept = abar[timesteps]
        scheduler.sigmas = torch.tensor(np.append(np.sqrt((1 - kept) / kept), 0.0))
    return scheduler


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_schedules_are_the_products_of_diffusers_betas(schedule):
    betas = diffusers.DDPMScheduler(F, **OPTIONS[schedule]).betas.double().numpy()
    abar = alphas_cumprod(schedule, F)
    # A beta of 0.999 rounded to float32 moves the product by 1e-5 in the cosine's last entry.
    np.testing.assert_allclose(abar[:-1], np.cumprod(1 - betas)[:-1], rtol=2e-6)
    np.testing.assert_allclose(abar, np.cumprod(1 - betas), rtol=2e-5)


@pytest.mark.parametrize("count", [2, 7, 10, 20, 50, 250, 1000])
def test_uniform_timesteps_are_diffusers_linspace(count):
    scheduler = diffusers.DDPMScheduler(F, timestep_spacing="linspace")
    scheduler.set_timesteps(count)
    np.testing.assert_array_equal(uniform_timesteps(F, count), scheduler.timesteps)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("clip", [True, False])
def test_dpm_solver(clip, schedule):
    abar = alphas_cumprod(schedule, F)
    for timesteps in (EVEN, UNEVEN):
        scheduler = diffusers.DPMSolverMultistepScheduler(F, thresholding=clip, **OPTIONS[schedule])
        scheduler.set_timesteps(timesteps=timesteps)
        got, _ = ours("dpm_solver", abar, timesteps, clip=clip)
        np.testing.assert_allclose(got, theirs(scheduler, abar, timesteps), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim(eta, schedule):
    """On diffusers' own spacings, "leading" and "trailing": it knows no others."""
    abar, clip = alphas_cumprod(schedule, F), eta > 0
    for spacing in ("leading", "trailing"):
        scheduler = diffusers.DDIMScheduler(
            F, clip_sample=clip, timestep_spacing=spacing, **OPTIONS[schedule]
        )
        scheduler.set_timesteps(10)
        timesteps = [t for t in scheduler.timesteps.tolist() if t < 950]
        scheduler.timesteps = torch.tensor(timesteps)
        got, draws = ours("ddim", abar, timesteps, clip=clip, eta=eta)

        def step(index, draws=draws):
            added = {"variance_noise": channels_first(draws[index])} if eta else {}
            return {"eta": eta, "use_clipped_model_output": clip} | added

        np.testing.assert_allclose(
            got, theirs(scheduler, abar, timesteps, step=step), rtol=1e-5, atol=1e-5
        )


VARIANCES = {"ddpm": "fixed_small", "ddpm_large": "fixed_large", "ddpm_learned": "learned_range"}


def fed(monkeypatch, draws):
    """diffusers' DDPM draws `draws` in turn."""
    turn = iter(draws)
    monkeypatch.setattr(
        scheduling_ddpm, "randn_tensor", lambda *shape, **options: channels_first(next(turn))
    )


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("name", sorted(VARIANCES))
def test_ddpm(name, schedule, monkeypatch):
    abar, learned = alphas_cumprod(schedule, F), name == "ddpm_learned"
    clip = schedule == "linear"
    scheduler = diffusers.DDPMScheduler(
        F, variance_type=VARIANCES[name], clip_sample=clip, **OPTIONS[schedule]
    )
    scheduler.set_timesteps(timesteps=UNEVEN)
    got, draws = ours(name, abar, UNEVEN, clip=clip)
    fed(monkeypatch, draws)
    expected = theirs(scheduler, abar, UNEVEN, learned=learned)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("prediction_type", "schedule"),
    [
        ("eps", "linear"),
        ("eps", "cosine"),
        ("x_0", "scaled_linear"),
        ("v", "linear"),
        ("v", "cosine"),
    ],
)
def test_prediction_types_at_the_ends_of_the_schedule(prediction_type, schedule, monkeypatch):
    """In float64 on one table, from the first timestep to the last and over neighbours, where
    tables in float32 differ by more than 1e-5. diffusers' DPM-Solver takes its steps in float32
    whatever it is given; the ancestral methods are the same to 1e-9."""
    abar = alphas_cumprod(schedule, F).astype(np.float64)
    options = {"prediction_type": TYPES[prediction_type], **OPTIONS[schedule]}
    with jax.enable_x64(True):
        solved, _ = ours("dpm_solver", abar, HARD, prediction_type=prediction_type)
        drawn, draws = ours("ddpm_large", abar, HARD, prediction_type=prediction_type)
    solver = diffusers.DPMSolverMultistepScheduler(F, thresholding=True, **options)
    solver = with_table(solver, abar, HARD)
    expected = theirs(solver, abar, HARD, prediction_type=prediction_type)
    np.testing.assert_allclose(solved, expected, rtol=1e-5, atol=1e-5)
    ancestral = diffusers.DDPMScheduler(F, variance_type="fixed_large", **options)
    fed(monkeypatch, draws)
    expected = theirs(
        with_table(ancestral, abar, HARD), abar, HARD, prediction_type=prediction_type
    )
    np.testing.assert_allclose(drawn, expected, atol=1e-9)

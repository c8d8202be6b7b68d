"""The samplers by name: one signature (see `ddim`), one scan, any descending subset of timesteps.

What they share, and which of diffusers' options it is:

- `uniform_timesteps` keeps both ends of the schedule: "linspace" of diffusers' DDPM and DDIM. Its
  DPM-Solver takes "linspace" of S + 1 and drops the clean end. `log_snr_timesteps` is even in
  log-SNR and drops it too (`use_lu_lambdas=True` keeps it): the better one for `dpm_solver`.
  "leading", "trailing" and any other spacing are given as `timesteps`.
- After the last kept timestep, whichever it is, the signal is 1 and the noise 0
  (`set_alpha_to_one=True`, `final_sigmas_type="zero"`): the last step returns the predicted x_0.
- That step draws no noise. diffusers' DDPM with a large or learned variance draws some there
  unless the last timestep is 0.
- `clip` bounds the predicted x_0 to [-1, 1] (`clip_sample=True`, with DDIM's
  `use_clipped_model_output=True`; `thresholding=True` at `sample_max_value=1` for DPM-Solver).
"""

from functools import partial

from mpqdiff.diffusion.ddim import ddim
from mpqdiff.diffusion.ddpm import ddpm
from mpqdiff.diffusion.dpm_solver import dpm_solver
from mpqdiff.diffusion.steps import (
    check_timesteps,
    initial_noise,
    log_snr_timesteps,
    noise_keys,
    step_keys,
    uniform_timesteps,
)
from mpqdiff.errors import unknown_name

__all__ = [
    "SAMPLERS",
    "check_timesteps",
    "ddim",
    "ddpm",
    "dpm_solver",
    "draws_noise",
    "initial_noise",
    "log_snr_timesteps",
    "noise_keys",
    "step_keys",
    "uniform_timesteps",
]

SAMPLERS = {
    "ddim": ddim,
    "ddpm": ddpm,
    "ddpm_large": partial(ddpm, variance="large"),
    "ddpm_learned": partial(ddpm, variance="learned"),
    "dpm_solver": dpm_solver,
}


def draws_noise(name: str, eta: float) -> bool:
    """Whether the sampler called `name` draws noise at its steps, and so needs `step_keys`.

    Raises InputError for an unknown name.
    """
    if name not in SAMPLERS:
        raise unknown_name("sampler", name, SAMPLERS)
    return eta > 0.0 if name == "ddim" else name.startswith("ddpm")

"""A model in which only two named sites affect the output: what each score makes of it.

Only eps_error and rollout_error, which run the rest of the network, can rank those sites first.
weight_error reads weights, output_error and manifold a site's own output, orthogonality what sites'
outputs share: all of these are the same whichever sites the output depends on. The tests below show
both, and what the other scores rank first instead.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff import sites
from mpqdiff.aggregate import aggregate
from mpqdiff.denoiser import Prediction, from_linen
from mpqdiff.diffusion.samplers import ddim
from mpqdiff.diffusion.schedule import alphas_cumprod
from mpqdiff.quantize import activations, simulate
from mpqdiff.quantize.apply import dequantized
from mpqdiff.record import record
from mpqdiff.sensitivity import SCORES, manifold_record

CHOICES = ((4, 8), (8, 8))
BLIND = ("manifold", "orthogonality", "output_error", "random", "weight_error")
PROPAGATED = ("eps_error", "rollout_error")
# Sites with the same entry read the same features: 0 to 3 echo each other, 4 and 5 stand alone.
GROUPS = (0, 0, 0, 0, 1, 2)
FEATURES, N, TIMESTEPS = 8, 48, np.array([60, 10], np.int32)
ALONE, ECHO = (4, 5), (0, 1)


class Planted(nn.Module):
    """Six Dense sites side by side; the output is the sum of the `live` ones and of no other."""

    live: tuple[int, ...]

    @nn.compact
    def __call__(self, x_t, t, label):
        x = x_t.reshape(x_t.shape[0], max(GROUPS) + 1, FEATURES)
        outputs = [
            nn.Dense(64, use_bias=False, name=f"site_{i}")(x[:, group])
            for i, group in enumerate(GROUPS)
        ]
        total = sum(outputs[i] for i in self.live)
        return Prediction(total[:, : x_t[0].size].reshape(x_t.shape))


def parameters(rng):
    return {
        f"site_{i}": {"kernel": jnp.asarray(rng.normal(size=(FEATURES, 64)), jnp.float32)}
        for i in range(len(GROUPS))
    }


@pytest.fixture(scope="module")
def planted():
    """`(live, params, *names) -> {name: Scores}`, and parameters with inputs to use."""
    rng = np.random.default_rng(0)
    params = parameters(rng)
    x_ts = rng.normal(size=(2, N, 4, 6, 1)).astype(np.float32)
    labels = np.zeros(N, np.int32)

    def scores(live, params, *names):
        denoise = from_linen(Planted(live))
        found, _ = sites.list_sites(denoise, params, *sites.example_inputs((4, 6, 1)))
        assert [site.path for site in found] == sorted(params)
        stats = record(denoise, params, x_ts, TIMESTEPS, labels, found)
        a_bits = dict.fromkeys((site.path for site in found), 8)
        table = activations.table(stats, found, mode="step_table", a_bits=a_bits)
        net = simulate.supernet(
            params, found, CHOICES, {8: table}, activations.lopsided(stats, found)
        )
        choices = net, found, CHOICES, np.ones((len(found), len(CHOICES)), bool)
        inputs = x_ts, TIMESTEPS, labels
        measure = {
            "manifold": lambda score: score(
                manifold_record.record(denoise, *choices, *inputs), *choices[1:]
            ),
            "orthogonality": lambda score: score(stats),
            "output_error": lambda score: score(denoise, *choices, *inputs),
            "eps_error": lambda score: score(denoise, *choices, *inputs),
            "rollout_error": lambda score: score(
                denoise, *choices, sampler, x_ts[0], labels, steps=len(TIMESTEPS)
            ),
            "weight_error": lambda score: score(*choices),
            "random": lambda score: score(jax.random.key(0), len(TIMESTEPS), len(found)),
        }
        return {name: measure[name](SCORES[name]) for name in names}

    return scores, params, x_ts


def sampler(denoise):
    """The two steps of TIMESTEPS."""
    abar = alphas_cumprod("linear", 100)

    def run(params, x_T, labels, keys):
        return ddim(
            denoise, params, x_T, labels, timesteps=TIMESTEPS, alphas_cumprod=abar, keys=keys
        )

    return run


def importance(scores):
    """One number per site, larger for one that should keep more bits."""
    value = aggregate(scores, timesteps=TIMESTEPS, num_timesteps=100)
    return value[:, 0] if value.ndim == 2 else value  # damage at the narrowest width


@pytest.mark.parametrize("live", [ALONE, ECHO])
def test_the_plant_is_one(planted, live):
    """Quantising a site changes the output if, and only if, the site is live."""
    _, params, x_ts = planted
    denoise = from_linen(Planted(live))
    before = denoise(params, x_ts[0], 3, None).eps
    for i in range(len(GROUPS)):
        name = f"site_{i}"
        changed = {**params, name: {"kernel": dequantized(params[name]["kernel"], 4)}}
        moved = float(jnp.abs(denoise(changed, x_ts[0], 3, None).eps - before).max())
        assert (moved > 1e-3) if i in live else (moved == 0.0)


def test_every_score_is_one_or_the_other():
    assert {*BLIND, *PROPAGATED} == set(SCORES)


@pytest.mark.parametrize("live", [ALONE, ECHO])
def test_propagated_scores_rank_first_what_the_output_depends_on(planted, live):
    scores, params, _ = planted
    for name, found in scores(live, params, *PROPAGATED).items():
        damage = importance(found)
        dead = np.delete(damage, live)
        assert set(np.argsort(damage)[-2:]) == set(live), name
        assert min(damage[list(live)]) > 1e-6 and not dead.any(), name


def test_the_other_scores_do_not_see_which_sites_the_output_depends_on(planted):
    scores, params, _ = planted
    one, other = (scores(live, params, *BLIND) for live in (ALONE, ECHO))
    for name in BLIND:
        np.testing.assert_array_equal(importance(one[name]), importance(other[name]), name)


@pytest.mark.parametrize("live", [ALONE, ECHO])
def test_orthogonality_ranks_first_what_no_other_site_carries(planted, live):
    scores, params, _ = planted
    theta = importance(scores(live, params, "orthogonality")["orthogonality"])
    assert set(np.argsort(theta)[-2:]) == set(ALONE)
    assert min(theta[i] for i in ALONE) > 3 * max(theta[i] for i in range(4))


def test_orthogonality_ranks_first_a_site_whose_output_never_changes(planted):
    """A dead site of constant output shares nothing with the others: it counts as irreplaceable."""
    scores, params, _ = planted
    silent = {**params, "site_2": {"kernel": jnp.zeros((FEATURES, 64))}}
    assert np.argmax(importance(scores(ALONE, silent, "orthogonality")["orthogonality"])) == 2


def test_weight_error_ranks_first_what_has_large_weights(planted):
    scores, params, _ = planted
    large = {**params, "site_3": {"kernel": 10.0 * params["site_3"]["kernel"]}}
    assert np.argmax(importance(scores(ALONE, large, "weight_error")["weight_error"])) == 3


def test_output_error_ranks_last_what_is_on_the_grid_already(planted):
    scores, params, _ = planted
    exact = {**params, "site_4": {"kernel": jnp.sign(params["site_4"]["kernel"])}}
    damage = importance(scores(ALONE, exact, "output_error")["output_error"])
    assert 0 < damage[4] < 0.1 * np.delete(damage, 4).min()  # what is left: its activations

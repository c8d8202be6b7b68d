"""A control: redundancy drawn at random, so that any plan that beats it has used information."""

import jax
import jax.numpy as jnp

from mpqdiff.records import Scores


def score(key: jax.Array, num_timesteps: int, num_sites: int) -> Scores:
    """Redundancy [T,L], uniform in [0,1) by site; the key is consumed.

    One draw per site, repeated over timesteps: independent draws would average out over T and
    leave every site alike.
    """
    drawn = jax.random.uniform(key, (num_sites,))
    value = jnp.broadcast_to(drawn, (num_timesteps, num_sites))
    return Scores(value=value, kind="redundancy", name="random")

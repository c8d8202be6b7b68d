"""Output error: relative error of a site's own output with only that site quantised.

It is local: it cannot know whether anything reads the output.
"""

import jax
import jax.numpy as jnp

from mpqdiff.errors import InputError
from mpqdiff.records import Scores, Statistics


def score(stats: Statistics) -> Scores:
    """Damage [T,L,K] from `stats.output_error`, which the recording pass measures.

    Sampling noise may let a wider choice measure worse than a narrower one; the running minimum
    over ascending widths removes that. Raises InputError when the statistics hold no output
    error, or one that is negative or not finite.
    """
    if stats.output_error is None:
        raise InputError("statistics hold no output_error: record again with the widths to try")
    error = jnp.asarray(stats.output_error)
    if not bool((jnp.isfinite(error) & (error >= 0)).all()):
        raise InputError("statistics: output_error has negative or non-finite entries")
    return Scores(value=jax.lax.cummin(error, axis=2), kind="damage", name="output_error")

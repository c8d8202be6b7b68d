"""Weight error: squared error of a site's weights at each width, blind to what they are fed.

It reads weights alone: it cannot know which sites matter.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import jax.numpy as jnp
import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.records import Scores


def score(weights: Sequence, w_bits: Sequence[int], quantize: Callable) -> Scores:
    """Damage [1,L,K] = sum of (quantize(W_l, b_k) - W_l)^2.

    weights: L arrays [..., out]; w_bits: K widths, ascending; `quantize(weight, bits)` returns
    the dequantised weight. Where a wider grid happens to fit worse, the value of the narrower
    one is kept, so that damage never rises with bits. Raises InputError on weights that are not
    finite, descending widths, and a quantiser that changes the shape.
    """
    widths = [int(bits) for bits in w_bits]
    if not widths or any(b < a for a, b in pairwise(widths)):
        raise InputError(f"w_bits is {widths}, expected one or more widths in ascending order")
    rows = []
    for index, weight in enumerate(weights):
        weight = jnp.asarray(weight)
        if not bool(jnp.isfinite(weight).all()):
            raise InputError(f"weights of site {index} are not finite: load the weights again")
        rows.append([_squared_error(weight, quantize(weight, bits)) for bits in widths])
    damage = np.minimum.accumulate(np.asarray(rows, np.float32), axis=-1)
    return Scores(value=jnp.asarray(damage)[None], kind="damage", name="weight_error")


def _squared_error(weight, quantized) -> float:
    if quantized.shape != weight.shape:
        raise InputError(f"quantize returned shape {quantized.shape}, expected {weight.shape}")
    return float(jnp.sum((quantized - weight) ** 2))

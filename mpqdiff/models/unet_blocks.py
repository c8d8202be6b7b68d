"""The blocks of a U-Net: residual, self-attention, and transformer with cross-attention.

Attention products (`Product`) and skip concatenations (`SkipConcat`) are modules, and so have
paths. Output layers of residual branches start at zero, as in ADM.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from mpqdiff.models.product import Product

# Where 1/sqrt(head width) is multiplied in: its powers on queries, keys and scores. One function,
# but other operands of the products.
ATTENTION_SCALES = {
    "query": (-0.5, 0.0, 0.0),
    "both": (-0.25, -0.25, 0.0),
    "scores": (0.0, 0.0, -0.5),
}
ZEROS = nn.initializers.zeros


def double(x):
    """Nearest neighbour: x [B,H,W,C] -> [B,2H,2W,C]."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def halve(x):
    """Means of 2 x 2: x [B,H,W,C] -> [B,H/2,W/2,C]."""
    return nn.avg_pool(x, (2, 2), (2, 2))


RESAMPLE: dict[str, Callable] = {"none": lambda x: x, "up": double, "down": halve}


class SkipConcat(nn.Module):
    """(h, skip) side by side on channels, as a module: the two halves differ in range."""

    @nn.compact
    def __call__(self, h, skip):
        return jnp.concatenate([h, skip], axis=-1)


class ResBlock(nn.Module):
    """Two normalised 3 x 3 convolutions; emb [B,E] shifts, or scales and shifts, between them.

    `resample` acts between the first SiLU and its convolution, and on the shortcut alike.
    """

    width: int
    norm: Callable
    scale_shift: bool
    resample: str = "none"

    @nn.compact
    def __call__(self, x, emb):
        resample = RESAMPLE[self.resample]
        h = resample(nn.silu(self.norm(name="norm1")(x)))
        h = nn.Conv(self.width, (3, 3), padding=1, name="conv1")(h)
        outputs = self.width * (2 if self.scale_shift else 1)
        emb = nn.Dense(outputs, name="embed")(nn.silu(emb))[:, None, None]
        norm = self.norm(name="norm2")
        if self.scale_shift:
            scale, shift = jnp.split(emb, 2, axis=-1)
            h = norm(h) * (1.0 + scale) + shift
        else:
            h = norm(h + emb)
        h = nn.Conv(self.width, (3, 3), padding=1, kernel_init=ZEROS, name="conv2")(nn.silu(h))
        x = resample(x)
        if x.shape[-1] != self.width:
            x = nn.Conv(self.width, (1, 1), name="shortcut")(x)
        return x + h


class Attention(nn.Module):
    """Multi-head attention of x [B,P,D] to source [B,Q,C]."""

    num_heads: int
    scale: str
    use_bias: bool = True

    @nn.compact
    def __call__(self, x, source):
        width = x.shape[-1]
        head = width // self.num_heads

        def project(name, tokens):
            out = nn.Dense(width, use_bias=self.use_bias, name=name)(tokens)
            return out.reshape(*tokens.shape[:2], self.num_heads, head)

        q, k, v = project("q", x), project("k", source), project("v", source)
        on_q, on_k, on_scores = (head**power for power in ATTENTION_SCALES[self.scale])
        scores = Product("bphd,bqhd->bhpq", name="qk")(q * on_q, k * on_k) * on_scores
        mixed = Product("bhpq,bqhd->bphd", name="pv")(nn.softmax(scores), v)
        return nn.Dense(width, kernel_init=ZEROS, name="out")(mixed.reshape(x.shape))


class OneToken(nn.Module):
    """`Attention` to a source of one token [B,1,C]: its softmax is 1, so queries do not matter."""

    width: int

    @nn.compact
    def __call__(self, source):
        value = nn.Dense(self.width, use_bias=False, name="v")(source)
        return nn.Dense(self.width, kernel_init=ZEROS, name="out")(value)


class SelfAttention(nn.Module):
    """Residual self-attention over the positions of x [B,H,W,C]."""

    num_heads: int
    scale: str
    norm: Callable

    @nn.compact
    def __call__(self, x):
        tokens = self.norm(name="norm")(x).reshape(x.shape[0], -1, x.shape[-1])
        mixed = Attention(self.num_heads, self.scale, name="attn")(tokens, tokens)
        return x + mixed.reshape(x.shape)


class TransformerBlock(nn.Module):
    """x [B,P,D]: self-attention, cross-attention to context [B,Q,C], gated GELU; all residual."""

    num_heads: int
    scale: str
    one_token: bool

    @nn.compact
    def __call__(self, x, context):
        norm = partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False)
        attention = partial(Attention, self.num_heads, self.scale, use_bias=False)
        h = norm(name="norm1")(x)
        x = x + attention(name="attn1")(h, h)
        if self.one_token:
            x = x + OneToken(x.shape[-1], name="attn2")(context)
        else:
            x = x + attention(name="attn2")(norm(name="norm2")(x), context)
        both = nn.Dense(8 * x.shape[-1], name="ff_in")(norm(name="norm3")(x))
        value, gate = jnp.split(both, 2, axis=-1)
        h = value * nn.gelu(gate, approximate=False)
        return x + nn.Dense(x.shape[-1], name="ff_out")(h)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of x [B,H,W,C] between two projections; residual."""

    num_heads: int
    scale: str
    groups: int
    depth: int
    one_token: bool

    @nn.compact
    def __call__(self, x, context):
        width = x.shape[-1]
        norm = nn.GroupNorm(self.groups, epsilon=1e-6, use_fast_variance=False, name="norm")
        h = nn.Dense(width, name="proj_in")(norm(x).reshape(x.shape[0], -1, width))
        for index in range(self.depth):
            block = TransformerBlock(
                self.num_heads, self.scale, self.one_token, name=f"block_{index}"
            )
            h = block(h, context)
        return x + nn.Dense(width, kernel_init=ZEROS, name="proj_out")(h).reshape(x.shape)

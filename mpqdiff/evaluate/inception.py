"""The Inception-v3 of FID: the TensorFlow graph of 2015-12-05, not the network of the paper.

What sets it apart: 1008 logits, no auxiliary head, average pools that leave the padding out of
the mean, and a max pool in the last block (Mixed_7c) where the others have an average pool.
Names follow the public PyTorch conversion of its weights (`mpqdiff.evaluate.inception_weights`).
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SIZE = 299  # pixels, height and width the graph works at
NUM_LOGITS = 1008
SPATIAL_CHANNELS = 7  # x 17 x 17 = 2023 dimensions, about as many as pooled features
BATCH = 16  # images at a time: more are no faster on a CPU, and take some 15 MB each
EPSILON = 1e-3  # of every batch normalisation


class Convention(NamedTuple):
    """How a reference evaluator brings uint8 pixels to the network: resize, then
    `(pixel - centre) / spread`."""

    half_pixel: bool  # output i samples input (i + 0.5) * scale - 0.5, else i * scale
    centre: float
    spread: float


DEFAULT = "inception"
CONVENTIONS = {
    # The graph's own, so that of the first FID code, of ADM's evaluator and of torch-fidelity.
    DEFAULT: Convention(half_pixel=False, centre=128.0, spread=128.0),
    # pytorch-fid's: `interpolate(align_corners=False)` of pixels in [0, 1], then 2x - 1.
    "inception_pytorch_fid": Convention(half_pixel=True, centre=127.5, spread=127.5),
}


@partial(jax.jit, static_argnames="convention")
def prepare(images: jax.Array, *, convention: str = DEFAULT) -> jax.Array:
    """`images` uint8 [n,H,W,C], C 1 or 3 (grey is repeated) -> what the network takes, float32
    [n,299,299,3] in about [-1, 1]."""
    how = CONVENTIONS[convention]
    pixels = (resize(images, half_pixel=how.half_pixel) - how.centre) / how.spread
    return jnp.broadcast_to(pixels, (*pixels.shape[:3], 3))


def resize(images: jax.Array, *, half_pixel: bool) -> jax.Array:
    """`images` uint8 [n,H,W,C] -> float32 [n,299,299,C] in 0..255, bilinear, without antialias:
    a smaller output skips pixels, as the references do."""
    rows, columns = (_taps(size, half_pixel) for size in images.shape[1:3])
    return _blend(_blend(images, rows, 1), columns, 2)


def _taps(size: int, half_pixel: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lower index, upper index, weight of the upper) of each of 299 outputs, all [299]."""
    scale, places = np.float32(size / SIZE), np.arange(SIZE, dtype=np.float32)
    if half_pixel:
        places = np.maximum((places + np.float32(0.5)) * scale - np.float32(0.5), 0)
    else:
        places = places * scale
    low = places.astype(np.int32)
    return low, np.minimum(low + 1, size - 1), places - low


def _blend(x: jax.Array, taps: tuple[np.ndarray, np.ndarray, np.ndarray], axis: int) -> jax.Array:
    low, high, weight = taps
    below, above = (jnp.take(x, at, axis=axis).astype(jnp.float32) for at in (low, high))
    return below + (above - below) * np.expand_dims(weight, [i for i in range(4) if i != axis])


class Convolution(nn.Module):
    """A convolution without bias, batch normalisation with stored statistics, ReLU."""

    width: int
    window: tuple[int, int]
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x):
        shape = (*self.window, x.shape[-1], self.width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        scale = self.param("scale", nn.initializers.ones, (self.width,))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        mean = self.param("mean", nn.initializers.zeros, (self.width,))
        variance = self.param("variance", nn.initializers.ones, (self.width,))
        factor = scale / jnp.sqrt(variance + EPSILON)
        # Without padding at stride 1, XLA's CPU back end takes 2 to 5 times as long.
        cropped = self.stride == 1 and self.padding == "VALID"
        x = jax.lax.conv_general_dilated(
            x,
            kernel * factor,
            (self.stride, self.stride),
            "SAME" if cropped else self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
        )
        if cropped:
            top, left = (size // 2 for size in self.window)
            x = x[:, top : x.shape[1] - top, left : x.shape[2] - left]
        return nn.relu(x + (bias - mean * factor))


def chain(x, *layers: tuple, stride: int = 1):
    """Convolutions (name, width, window) one after another; the last takes `stride`, and where
    that is 2 no padding. A window is square or (height, width)."""
    for name, width, window in layers:
        window = window if isinstance(window, tuple) else (window, window)
        last = stride if name == layers[-1][0] else 1
        x = Convolution(width, window, last, "SAME" if last == 1 else "VALID", name=name)(x)
    return x


def average_pool(x):
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def max_pool(x, *, stride: int = 2, padding: str = "VALID"):
    return nn.max_pool(x, (3, 3), (stride, stride), padding)


def join(*branches):
    return jnp.concatenate(branches, axis=-1)


class MixedA(nn.Module):
    """35 x 35: windows of 1, 5 and twice 3."""

    pool_width: int

    @nn.compact
    def __call__(self, x):
        double = ("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)
        return join(
            chain(x, ("branch1x1", 64, 1)),
            chain(x, ("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)),
            chain(x, *double),
            chain(average_pool(x), ("branch_pool", self.pool_width, 1)),
        )


class MixedB(nn.Module):
    """35 x 35 to 17 x 17."""

    @nn.compact
    def __call__(self, x):
        double = ("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)
        return join(
            chain(x, ("branch3x3", 384, 3), stride=2), chain(x, *double, stride=2), max_pool(x)
        )


class MixedC(nn.Module):
    """17 x 17: windows of 7 split into rows and columns. The first 192 channels are branch1x1."""

    inner: int

    @nn.compact
    def __call__(self, x):
        c, row, column = self.inner, (1, 7), (7, 1)
        single = ("branch7x7_1", c, 1), ("branch7x7_2", c, row), ("branch7x7_3", 192, column)
        double = (
            ("branch7x7dbl_1", c, 1),
            ("branch7x7dbl_2", c, column),
            ("branch7x7dbl_3", c, row),
            ("branch7x7dbl_4", c, column),
            ("branch7x7dbl_5", 192, row),
        )
        return join(
            chain(x, ("branch1x1", 192, 1)),
            chain(x, *single),
            chain(x, *double),
            chain(average_pool(x), ("branch_pool", 192, 1)),
        )


class MixedD(nn.Module):
    """17 x 17 to 8 x 8."""

    @nn.compact
    def __call__(self, x):
        sevens = (
            ("branch7x7x3_1", 192, 1),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, 3),
        )
        return join(
            chain(x, ("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3), stride=2),
            chain(x, *sevens, stride=2),
            max_pool(x),
        )


class MixedE(nn.Module):
    """8 x 8: windows of 3 that fork into a row and a column."""

    max_pooled: bool

    @nn.compact
    def __call__(self, x):
        single = chain(x, ("branch3x3_1", 384, 1))
        double = chain(x, ("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3))
        pooled = max_pool(x, stride=1, padding="SAME") if self.max_pooled else average_pool(x)
        return join(
            chain(x, ("branch1x1", 320, 1)),
            chain(single, ("branch3x3_2a", 384, (1, 3))),
            chain(single, ("branch3x3_2b", 384, (3, 1))),
            chain(double, ("branch3x3dbl_3a", 384, (1, 3))),
            chain(double, ("branch3x3dbl_3b", 384, (3, 1))),
            chain(pooled, ("branch_pool", 192, 1)),
        )


class Head(nn.Module):
    """The linear layer over the features, whose bias is stored in any case."""

    biased: bool

    @nn.compact
    def __call__(self, features):
        shape = (features.shape[-1], NUM_LOGITS)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (NUM_LOGITS,))
        logits = jnp.matmul(features, kernel, precision="highest")
        return logits + bias if self.biased else logits


class Inception(nn.Module):
    """The graph from prepared pixels on: pooled features, logits and the features of sFID.

    Products run at the highest precision, so that features agree between CPU, GPU and TPU.
    Logits leave out the bias of the last layer, as the references do for the Inception Score;
    `biased` adds it, for the classes themselves.
    """

    biased: bool = False

    @nn.compact
    def __call__(self, x):
        """`x` float32 [n,299,299,3] of `prepare` -> float32 features [n,2048], logits [n,1008],
        spatial [n,2023].

        `spatial` are the first 7 channels of TensorFlow's `mixed_6/conv` in ADM's order, channels
        last. That graph counts from `mixed` = Mixed_5b, so it is the branch1x1 of Mixed_6d, with
        which the channels of that block begin.
        """
        x = Convolution(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = Convolution(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = max_pool(Convolution(64, (3, 3), name="Conv2d_2b_3x3")(x))
        x = Convolution(80, (1, 1), name="Conv2d_3b_1x1")(x)
        x = max_pool(Convolution(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x))
        x = MixedA(32, name="Mixed_5b")(x)
        x = MixedA(64, name="Mixed_5c")(x)
        x = MixedA(64, name="Mixed_5d")(x)
        x = MixedB(name="Mixed_6a")(x)
        x = MixedC(128, name="Mixed_6b")(x)
        x = MixedC(160, name="Mixed_6c")(x)
        x = MixedC(160, name="Mixed_6d")(x)
        spatial = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
        x = MixedC(192, name="Mixed_6e")(x)
        x = MixedD(name="Mixed_7a")(x)
        x = MixedE(max_pooled=False, name="Mixed_7b")(x)
        features = MixedE(max_pooled=True, name="Mixed_7c")(x).mean((1, 2))
        return features, Head(self.biased, name="fc")(features), spatial

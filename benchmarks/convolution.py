"""Float32 against int8 convolutions at the shapes of U-Nets: medians and ratios from one run.

    python benchmarks/convolution.py [--models fashion cifar ldm] [--repeats 15]

Every row times its forms in turn, so that all meet the same machine; ratios are float32's time over
theirs (above 1: faster). `layer` is the whole integer layer (quantise, convolve, dequantise, bias),
asymmetric, as samplers run it; `torch` is torch's float32 conv2d in its faster memory format, with
as many threads as processors, where torch is installed.
"""

import argparse
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from matmul import medians

from mpqdiff.kernels.quantized_conv import quantized_conv
from mpqdiff.quantize.numerics import column_sums

# Images, then (size, inputs, outputs, kernel, stride) of the convolutions of each network.
MODELS = {
    "fashion": (
        64,
        [
            *((28, 1, 16, 3, 1), (28, 16, 16, 3, 1), (28, 32, 16, 3, 1), (28, 36, 16, 3, 1)),
            *((28, 16, 16, 3, 2), (28, 32, 16, 1, 1), (28, 16, 1, 3, 1), (14, 20, 20, 3, 1)),
            *((14, 40, 20, 3, 1), (14, 84, 20, 3, 1), (7, 64, 64, 3, 1), (7, 128, 64, 3, 1)),
        ],
    ),
    "cifar": (
        8,
        [
            *((32, 3, 128, 3, 1), (32, 128, 128, 3, 1), (32, 256, 128, 3, 1)),
            *((32, 128, 128, 3, 2), (16, 256, 256, 3, 1), (16, 512, 256, 1, 1)),
            *((8, 512, 256, 3, 1), (4, 256, 256, 3, 1), (32, 128, 3, 3, 1)),
        ],
    ),
    "ldm": (2, [(32, 192, 192, 3, 1), (32, 384, 192, 3, 1), (16, 384, 384, 3, 1)]),
}


def float_layer(stride: int, padding) -> Callable:
    """(x, kernel, bias) -> y by XLA's float32 convolution."""

    def run(x, kernel, bias):
        y = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + bias

    return run


def integer_layer(size: int, stride: int, padding) -> Callable:
    """(x, qvalue, scale, colsum, bias) -> y."""

    def run(x, qvalue, scale, colsum, bias):
        geometry = dict(kernel_size=(size, size), strides=(stride, stride), padding=padding)
        one, zero = jnp.float32(0.03), jnp.int8(3)
        return quantized_conv(x, qvalue, one, zero, scale, colsum, bias, **geometry)

    return run


def torch_layer(x, kernel, stride: int, padding) -> Callable | None:
    """A call of torch's conv2d on the same arrays, channels last; None without torch."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    (before, after), _ = padding
    # torch pads alike on both sides: the uneven padding of a stride is put on beforehand.
    padded = np.pad(x, ((0, 0), *[(0, after - before)] * 2, (0, 0)))
    image = torch.from_numpy(padded.transpose(0, 3, 1, 2))
    weight = torch.from_numpy(np.array(kernel).transpose(3, 2, 0, 1))
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = torch.zeros(kernel.shape[-1])

    def run():
        with torch.inference_mode():
            return torch.nn.functional.conv2d(image, weight, bias, stride, before)

    return run


def row(rng, images: int, shape: tuple[int, int, int, int, int], repeats: int) -> dict[str, float]:
    """Median seconds of every form of one convolution."""
    width, inputs, outputs, size, stride = shape
    before = 0 if size == 1 or stride == 2 else 1
    padding = ((before, int(size > 1)),) * 2
    x = rng.standard_normal((images, width, width, inputs)).astype(np.float32)
    kernel = rng.standard_normal((size, size, inputs, outputs)).astype(np.float32)
    qvalue = rng.integers(-127, 128, (size * size * inputs, outputs)).astype(np.int8)
    bias, scale = np.zeros(outputs, np.float32), np.full(outputs, 0.01, np.float32)
    held = map(jnp.asarray, (qvalue, scale, column_sums(jnp.asarray(qvalue)), bias))
    functions: dict[str, tuple[Callable, tuple]] = {
        "float32": (float_layer(stride, padding), (jnp.asarray(x), jnp.asarray(kernel), bias)),
        "layer": (integer_layer(size, stride, padding), (jnp.asarray(x), *held)),
    }
    torch = torch_layer(x, kernel, stride, padding)
    return medians(functions, repeats, {"torch": torch} if torch else {})


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"repeats {options.repeats} must be positive")
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print("| convolution | images | float32, us | layer | torch float32 | layer / torch |")
    print("|---|---|---|---|---|---|")
    rng = np.random.default_rng(0)
    for name in options.models:
        images, shapes = MODELS[name]
        for shape in shapes:
            width, inputs, outputs, size, stride = shape
            taken = row(rng, images, shape, options.repeats)
            cells = [f"{taken['float32'] * 1e6:.0f}", f"{taken['float32'] / taken['layer']:.2f}x"]
            if "torch" in taken:
                cells.append(f"{taken['float32'] / taken['torch']:.2f}x")
                cells.append(f"{taken['torch'] / taken['layer']:.2f}x")
            else:
                cells += ["-", "-"]
            label = f"{name} {width}x{width} {inputs} -> {outputs}, {size}x{size} / {stride}"
            print(f"| {label} | {images} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

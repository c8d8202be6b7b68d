"""Is a trained model good enough? The share of guided samples that show the requested class.

    python benchmarks/class_agreement.py [--weights fashion_dit] [--guidance 2.0] [--images 1000]

Float32, 50-step DDIM; the embedded classifier decides. The bar for shipping weights is 85 %.
"""

import argparse

import jax
import numpy as np

from mpqdiff import cli, images, weights
from mpqdiff.denoiser import from_linen
from mpqdiff.diffusion.guidance import guide
from mpqdiff.diffusion.samplers import ddim, initial_noise, uniform_timesteps
from mpqdiff.diffusion.schedule import alphas_cumprod
from mpqdiff.evaluate import features
from mpqdiff.evaluate.frechet import fid, target


def main() -> None:
    """Print agreement overall and by class, and the Frechet distance of the samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default="fashion_dit")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    cli.prepare_jax()
    module, params, _ = weights.load(options.weights)
    denoise = guide(from_linen(module), scale=options.guidance, null=module.num_classes)
    shape = (module.image_size, module.image_size, module.channels)

    @jax.jit
    def run(params, noise, labels):
        return ddim(
            denoise,
            params,
            noise,
            labels,
            timesteps=uniform_timesteps(1000, options.steps),
            alphas_cumprod=alphas_cumprod("linear", 1000),
        )

    labels = np.arange(options.images, dtype=np.int32) % module.num_classes
    parts = []
    for start in range(0, options.images, options.batch):
        noise = initial_noise(options.seed, start, options.batch, shape)
        parts.append(np.asarray(run(params, noise, labels[start : start + options.batch])))
    samples = images.to_uint8(np.concatenate(parts))
    network = features.load()
    reference = features.load_reference(network=network)
    found, logits = features.extract(network, samples)
    hits = logits.argmax(-1) == labels
    by_class = [float(hits[labels == label].mean()) for label in range(module.num_classes)]
    distance = fid(found, target(reference.train_mean, reference.train_cov))
    print(
        f"weights {options.weights}, guidance {options.guidance}, {options.steps} steps, "
        f"{options.images} images, seed {options.seed}"
    )
    print(f"agreement {hits.mean():.3f}; by class {[round(value, 2) for value in by_class]}")
    print(f"Frechet distance in {network.name}'s features {distance:.2f} (n={options.images})")


if __name__ == "__main__":
    main()

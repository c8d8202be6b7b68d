"""Orthogonality of all site pairs at all timesteps: the published double loop against ours.

    python benchmarks/orthogonality.py [--sites 11 22 43] [--timesteps 20] [--samples 64]
                                       [--features 1024] [--rounds 5]

Both start from the same float32 features in memory and end with [T,L,L]. The double loop (OMPQ,
arXiv 2109.07865) rebuilds and centres both Grams for every ordered pair, on NumPy's BLAS; ours
builds every Gram once and takes all pairs as one product, jitted (compiled before timing).
Rounds alternate between the two; the ratio is that of the medians.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mpqdiff.kernels.gram import gram as centred_gram
from mpqdiff.sensitivity.orthogonality import orm


def double_loop(features: np.ndarray) -> np.ndarray:
    """features [T,L,N,d] float32 -> [T,L,L] float32, pair by pair."""
    timesteps, sites = features.shape[:2]
    out = np.zeros((timesteps, sites, sites), np.float32)
    for t in range(timesteps):
        for i in range(sites):
            for j in range(sites):
                k, g = _centred_gram(features[t, i]), _centred_gram(features[t, j])
                out[t, i, j] = np.sum(k * g) / (np.linalg.norm(k) * np.linalg.norm(g))
    return out


def _centred_gram(x: np.ndarray) -> np.ndarray:
    """H X X' H of x [N,d]."""
    gram = x @ x.T
    rows = gram.mean(axis=0, keepdims=True)
    return gram - rows - rows.T + gram.mean()


@jax.jit
def ours(features):
    """The same with every Gram built once, as recording builds it, and all pairs at once."""
    timesteps, sites, samples, width = features.shape
    # One product after another: XLA's batched product is several times slower on CPUs.
    gram, row_sums = jax.lax.map(centred_gram, features.reshape(-1, samples, width))
    gram = gram.reshape(timesteps, sites, samples, samples)
    return jax.vmap(lambda k, r: orm(k, row_sums=r))(
        gram, row_sums.reshape(timesteps, sites, samples)
    )


def seconds(function, *args) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - begin


def compare(sites: int, *, timesteps: int, samples: int, features: int, rounds: int) -> dict:
    """Medians in seconds over alternating rounds, and the largest difference of the results."""
    rng = np.random.default_rng(sites)
    x = rng.normal(size=(timesteps, sites, samples, features)).astype(np.float32)
    on_device = jnp.asarray(x)
    difference = float(np.abs(double_loop(x[:1]) - np.asarray(ours(on_device[:1]))).max())
    jax.block_until_ready(ours(on_device))
    slow, fast = [], []
    for _ in tqdm(range(rounds), desc=f"{sites} sites", unit="round", leave=False):
        slow.append(seconds(double_loop, x))
        fast.append(seconds(ours, on_device))
    return {
        "loop": statistics.median(slow),
        "ours": statistics.median(fast),
        "difference": difference,
    }


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, nargs="+", default=[11, 22, 43])
    parser.add_argument("--timesteps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    options = vars(parser.parse_args(argv))
    counts = options.pop("sites")
    print("all pairs at all timesteps; medians;", ", ".join(f"{k}={v}" for k, v in options.items()))
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, numpy {np.__version__}")
    print("| sites | double loop, s | ours, s | ratio of medians | largest difference |")
    print("|---|---|---|---|---|")
    for sites in counts:
        out = compare(sites, **options)
        ratio = out["loop"] / out["ours"]
        cells = f"{sites} | {out['loop']:.3f} | {out['ours']:.4f} | {ratio:.1f}"
        print(f"| {cells} | {out['difference']:.1e} |")


if __name__ == "__main__":
    main()

"""Time of the evaluation, beside torch-fidelity's on the same images and features in one run.

    python benchmarks/evaluation.py [--images 10000] [--dimensions 2048] [--inception 32]
                                    [--streamed 50000]

The first row is the promise of 60 s: features of images on disk in the shipped classifier, their
mean and covariance. The second is all of `mpqdiff evaluate --images=...`. torch-fidelity has no
network for small images. The others give both the same arrays. Inception runs with random weights,
carried over. `difference` is the relative one of the two values (of features: to their largest);
torch-fidelity takes its kernel distance in the features' own float32, the row after gives it
float64, which is what ours computes in. Below: the most memory that a process held which took the
statistics (and, here, the distance) of `--streamed` rows. Limits are for two cores that nothing
else uses. Without torch-fidelity (`pip install torch` and `pip install --no-deps torch-fidelity`)
the times stand alone.
"""

import argparse
import importlib
import importlib.util
import resource
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from mpqdiff import cli
from mpqdiff.evaluate import features, frechet, inception, inception_weights, statistics
from mpqdiff.evaluate.image_folder import open_images, write_images
from mpqdiff.evaluate.image_metrics import evaluate_images, extract
from mpqdiff.evaluate.inception_score import inception_score
from mpqdiff.evaluate.kernel_distance import subset_kernel_distance
from mpqdiff.evaluate.manifold import precision_recall


class Row(NamedTuple):
    """One computation: how it is called here and there, for equal results."""

    name: str
    size: str
    ours: Callable[[], Any]
    theirs: Callable[[Any], Any] | None = None
    limit: float | None = None  # seconds on two cores that were promised

    def promise(self, seconds: float) -> str:
        """Whether the limit was held, in words."""
        if self.limit is None:
            return "-"
        return f"{self.limit:g} s: {'held' if seconds < self.limit else 'MISSED'}"


def fidelity() -> Any:
    """torch-fidelity's metric files and network as a namespace, or None where it is not installed.

    Its package imports torchvision on its way, for images only: the files that are used are loaded
    without the package's own `__init__`.
    """
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None or spec.origin is None or importlib.util.find_spec("torch") is None:
        return None
    package = types.ModuleType("torch_fidelity")
    package.__path__ = [str(Path(spec.origin).parent)]
    reading = types.ModuleType("torch_fidelity.utils")
    vars(reading)["__getattr__"] = lambda name: None
    sys.modules |= {"torch_fidelity": package, "torch_fidelity.utils": reading}
    names = (
        "metric_fid",
        "metric_kid",
        "metric_isc",
        "metric_prc",
        "feature_extractor_inceptionv3",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = {name: importlib.import_module(f"torch_fidelity.{name}") for name in names}
        return types.SimpleNamespace(torch=importlib.import_module("torch"), **parts)


def pictures(count: int, seed: int) -> np.ndarray:
    """Smooth random images, uint8 [count,28,28,1]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 7, 7, 1), np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


def correlated(count: int, dimensions: int, seed: int) -> np.ndarray:
    """Features float32 [count,dimensions] whose spectrum falls as that of real ones does."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).normal(size=(dimensions, dimensions)).astype(np.float32)
    scales = 1.0 / np.sqrt(np.arange(1, dimensions + 1, dtype=np.float32))
    values = rng.standard_normal((count, dimensions), np.float32) * scales
    return values @ mixing / np.float32(np.sqrt(dimensions)) + np.float32(0.01 * seed)


def metric_rows(count: int, dimensions: int) -> list[Row]:
    """Statistics and metrics of the same features."""
    own, real = correlated(count, dimensions, 1), correlated(count, dimensions, 2)
    moments = [statistics.moments(values) for values in (own, real)]
    gaussians = [(found.mean, found.cov) for found in moments]
    named = [{"mu": mean, "sigma": cov} for mean, cov in gaussians]
    logits = 3 * correlated(count, 1008, 3)
    subsets = {"kid_subsets": 10, "kid_subset_size": min(1000, count), "verbose": False}
    few = min(count, 5000)
    shape = f"{count} x {dimensions}"

    def their_statistics(parts):
        found = parts.metric_fid.fid_features_to_statistics(parts.torch.from_numpy(own))
        return found["sigma"]

    def their_fid(parts):
        return next(iter(parts.metric_fid.fid_statistics_to_metric(*named, False).values()))

    def their_kid(parts, dtype: Any = np.float32):
        pair = (parts.torch.from_numpy(values.astype(dtype)) for values in (own, real))
        return next(iter(parts.metric_kid.kid_features_to_metric(*pair, **subsets).values()))

    def their_score(parts):
        found = parts.metric_isc.isc_features_to_metric(parts.torch.from_numpy(logits), 1, False)
        return next(iter(found.values()))

    def their_manifold(parts):
        pair = (parts.torch.from_numpy(values[:few]).double() for values in (own, real))
        return parts.metric_prc.calculate_precision_recall_part(*pair)[:2]

    def our_kid():
        size = subsets["kid_subset_size"]
        return subset_kernel_distance(own, real, subset_size=size, num_subsets=10)[0]

    return [
        Row("mean and covariance", shape, lambda: statistics.moments(own).cov, their_statistics),
        Row(
            "Frechet distance",
            f"{dimensions} dimensions",
            lambda: frechet.frechet_distance(*gaussians[0], *gaussians[1]),
            their_fid,
            limit=10.0,
        ),
        Row("kernel distance, 10 subsets", shape, our_kid, their_kid),
        Row(
            "kernel distance, both in float64", shape, our_kid, partial(their_kid, dtype=np.float64)
        ),
        Row("inception score", f"{count} x 1008", lambda: inception_score(logits), their_score),
        Row(
            "precision and recall",
            f"{few} x {dimensions}",
            lambda: precision_recall(own[:few], real[:few]),
            their_manifold,
        ),
    ]


def image_rows(count: int, folder: Path) -> list[Row]:
    """From images on disk, in the shipped classifier: statistics alone, then every metric."""
    write_images(folder / "own.npz", pictures(count, 1))
    network, shape = features.load(), f"{count} images 28x28"

    def moments():
        return statistics.moments(extract(network, open_images(folder / "own.npz")).features)

    whole = partial(evaluate_images, folder / "own.npz", "fashion_reference")
    return [
        Row("features and statistics", shape, moments, limit=60.0),
        Row("evaluate --images", shape, whole),
    ]


def inception_row(count: int, folder: Path, parts: Any) -> Row:
    """Features of the same images by Inception-v3 with the same random weights."""
    rng = np.random.default_rng(0)
    state = {}
    for name, shape in inception_weights.torch_shapes().items():
        spread = np.sqrt(2.0 / max(1, np.prod(shape[1:]))) if len(shape) > 1 else 0.1
        values = rng.standard_normal(shape, np.float32) * np.float32(spread)
        state[name] = values + 1 if name.endswith(("running_var", "bn.weight")) else values
        if name.endswith("running_var"):
            state[name] = np.abs(state[name])
    save_file(state, folder / "weights.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these are not the public weights, as it says
        network = features.load("inception", weights=folder / "weights.safetensors")
    images = pictures(count, 5).repeat(3, axis=-1)
    batch = min(count, inception.BATCH)
    features.collect(network, images[:batch], batch=batch)
    theirs = None if parts is None else _torch_inception(parts, state, images, batch, folder)
    return Row(
        "Inception features",
        f"{count} images",
        lambda: features.collect(network, images, batch=batch).features,
        theirs,
    )


def _torch_inception(parts: Any, state: dict, images: np.ndarray, batch: int, folder: Path):
    torch, path = parts.torch, str(folder / "weights.pth")
    torch.save({name: torch.from_numpy(values) for name, values in state.items()}, path)
    extractor = parts.feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "inception", ["2048"], feature_extractor_weights_path=path
    )
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    extractor(pixels[:batch])

    def run(_):
        starts = range(0, len(pixels), batch)
        found = [extractor(pixels[start : start + batch])[0] for start in starts]
        return torch.cat(found).numpy()

    return run


class Timed(NamedTuple):
    """A call's result, and its seconds on the clock and of all cores together."""

    result: Any
    wall: float
    cpu: float

    @property
    def cell(self) -> str:
        return f"{self.wall:.2f} ({self.cpu:.2f})"


def timed(call: Callable[..., Any], *args) -> Timed:
    """One call of `call(*args)`."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call(*args)
    return Timed(result, time.perf_counter() - wall, time.process_time() - cpu)


def peak(which: str, count: int, dimensions: int) -> float:
    """GB that this process has held at most after the statistics of `count` random rows: by
    "mpqdiff" from batches, with a distance, by "torch-fidelity" from all rows as it takes them."""
    rng = np.random.default_rng(0)
    if which == "mpqdiff":
        found = statistics.empty(dimensions)
        for start in range(0, count, 500):
            rows = rng.standard_normal((min(500, count - start), dimensions), np.float32)
            found = found.update(rows)
        frechet.frechet_distance(
            found.mean, found.cov, np.zeros(dimensions), np.diag(np.linspace(1, 2, dimensions))
        )
    else:
        parts = fidelity()
        rows = parts.torch.from_numpy(rng.standard_normal((count, dimensions), np.float32))
        parts.metric_fid.fid_features_to_statistics(rows)
    return high_water() / 1e9


def high_water() -> int:
    """Bytes that this process has held at most. On Linux `ru_maxrss` would do but for a process
    that another started: it begins with what that one held."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def peaks(count: int, dimensions: int, known: bool) -> None:
    """Print the memory of both, each in a process of its own."""
    print("\n| peak memory | size | mpqdiff GB | torch-fidelity GB | limit |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    found = []
    for which in ("mpqdiff", "torch-fidelity")[: 1 + known]:
        call = [sys.executable, __file__, "--peak", which, "--streamed", str(count)]
        call += ["--dimensions", str(dimensions)]
        found.append(float(subprocess.run(call, check=True, stdout=-1, text=True).stdout))
    cells = [f"{value:.2f}" for value in found] + ["-"] * (2 - len(found))
    held = "held" if found[0] < 2.0 else "MISSED"
    print(
        f"| statistics | {count} x {dimensions} | {' | '.join(cells)} | 2 GB: {held} |", flush=True
    )


def difference(ours, theirs) -> float:
    """Largest difference over the largest value."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


def main() -> None:
    """Print one line per computation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--dimensions", type=int, default=2048)
    parser.add_argument("--inception", type=int, default=32, help="images; 0: leave Inception out")
    parser.add_argument("--streamed", type=int, default=50_000, help="rows; 0: leave memory out")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak(options.peak, options.streamed, options.dimensions))
        return
    cli.prepare_jax()
    parts = fidelity()
    print(
        "| computation | size | mpqdiff s (CPU s) | torch-fidelity s | ratio | difference | limit |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = image_rows(options.images, folder)
        rows += metric_rows(options.images, options.dimensions)
        if options.inception:
            rows.append(inception_row(options.inception, folder, parts))
        for row in rows:
            ours, cells = timed(row.ours), ["-", "-", "-"]
            if parts is not None and row.theirs is not None:
                theirs = timed(row.theirs, parts)
                apart = difference(ours.result, theirs.result)
                cells = [theirs.cell, f"{theirs.wall / ours.wall:.2f}x", f"{apart:.1e}"]
            cells.append(row.promise(ours.wall))
            print(f"| {row.name} | {row.size} | {ours.cell} | {' | '.join(cells)} |", flush=True)
    if options.streamed:
        peaks(options.streamed, options.dimensions, parts is not None)


if __name__ == "__main__":
    main()

"""Set metrics of images on disk, without a model: features streamed, then `evaluate`'s numbers.

Against a folder or array of images, statistics of an FID tool (mu and sigma: FID alone) or a
shipped reference. The numbers carry what they were measured with, as a run's do.
"""

import warnings
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mpqdiff.artifacts import load_arrays, save_arrays
from mpqdiff.errors import InputError
from mpqdiff.evaluate import features as networks
from mpqdiff.evaluate import frechet, intervals, statistics
from mpqdiff.evaluate.evaluator import Estimate, Given, measure
from mpqdiff.evaluate.features import FeatureNetwork, Features
from mpqdiff.evaluate.image_folder import ARRAY, ImageSet, open_images
from mpqdiff.evaluate.protocol import INDICATIVE_BELOW, fid_name, leading

METRICS = ("fid", "fid_infinity", "sfid", "kid", "is", "precision", "recall")
# How a table names them; `{fid}` is the protocol's name, and marks what few images spoil.
SHOWN = {name: name for name in METRICS} | {
    "fid": "{fid}", "fid_infinity": "{fid}, infinitely many", "sfid": "s{fid}",
}  # fmt: skip


def evaluate_images(
    images: str | Path,
    reference: str | Path = "",
    *,
    features: str = "fashion_classifier",
    weights: str = "",
    out: str | Path | None = None,
    seed: int = 0,
    fid_infinity: bool = False,
) -> dict[str, Any]:
    """The row of set metrics of the images in `images`, with its protocol.

    Args:
      images: a folder, .npz or .npy of images (`image_folder.open_images`).
      reference: the same, an .npz with mu and sigma, or the name of a shipped reference. "" for
        none: what needs one is None.
      features, weights: the feature network and the file of its weights, "" where they ship.
      out: an .npz to write mu and sigma of `images` to, which can be a reference later.
      seed: of the jackknife's subsamples.
      fid_infinity: extrapolate FID to infinitely many images too; None where not asked for.

    Returns METRICS, each with name_ci, [low, high] at 95 %; `n_images`; `protocol`. Against
    statistics alone, KID, precision and recall are None.

    Raises InputError on images that `image_folder` refuses or of another size than the network
    takes, fewer than 2 of them, a reference that cannot be read or is of other features, and with
    neither a reference nor `out`; with `fid_infinity`, on fewer than 8 D images. Warns about
    constant images, and where the images are too few for the rank of FID's covariance.
    """
    if not reference and out is None:
        raise InputError(
            "nothing to do: name a reference (--reference=FILE, folder or shipped name), or a "
            "file for the images' own statistics (--out=FILE.npz)"
        )
    if out is not None and Path(out).suffix != ".npz":
        raise InputError(f"--out={out}: expected a name that ends in .npz")
    network = networks.load(features, weights=weights or None)
    found = open_for(network, images)
    if found.count < 2:
        raise InputError(f"{images}: holds {found.count} image, expected at least 2")
    given, described = _reference(reference, network, found.shape)
    own = extract(network, found)
    if out is not None:
        save_statistics(out, own, network.hash)
    spatial = own.spatial if given.spatial_reference is not None else None
    omitted = intervals.omissions(found.count, seed=seed) if found.count > 2 else None
    given = given._replace(
        features=own.features, logits=own.logits, spatial=spatial, omitted=omitted
    )
    estimates, row = measure(given), {}
    estimates |= measure(given, ["fid_infinity"] if fid_infinity else [])
    for name in METRICS:
        estimate = estimates.get(name, Estimate())
        row[name], row[f"{name}_ci"] = estimate.value, estimate.ends
    row["n_images"] = found.count
    row["protocol"] = {
        "feature_space": network.name,
        "feature_hash": network.hash,
        "is_fid": network.is_fid,
        "fid_name": fid_name(network.name, network.is_fid),
        **described,
        "images": str(images),
        "n_images": found.count,
        "image_size": list(found.shape),
        "indicative": found.count < INDICATIVE_BELOW,
        "leading": [name for name in leading(found.count) if name in METRICS],
    }
    return row


def table(row: dict[str, Any]) -> str:
    """What `evaluate_images` found, for people: leading numbers first, then what they mean."""
    protocol = row["protocol"]
    names = {name: SHOWN[name].format(fid=protocol["fid_name"]) for name in protocol["leading"]}
    found = [name for name in names if row[name] is not None]
    width = max((len(names[name]) for name in found), default=0)
    lines = []
    for name in found:
        ends = row[f"{name}_ci"]
        interval = f"  ({ends[0]:.6g} to {ends[1]:.6g})" if ends else ""
        few = protocol["indicative"] and SHOWN[name] != name
        note = "  indicative only" if few else ""
        lines.append(f"{names[name]:<{width}}  {row[name]:.6g}{interval}{note}")
    size = "x".join(map(str, protocol["image_size"]))
    lines.append(f"of {row['n_images']} images {size} in {protocol['images']}")
    if protocol["reference"]:
        count = protocol["reference_count"]
        lines.append(f"against {protocol['reference']} ({count or 'an unknown number of'} images)")
    if not protocol["is_fid"]:
        lines.append("a Frechet distance of these features is not the published FID")
    lines.append(
        f"features {protocol['feature_space']} ({protocol['feature_hash'][:16]}); 95 % intervals "
        "over the images, reference held fixed; comparable only in the same features, against the "
        "same reference, at the same number"
    )
    return "\n".join(lines)


def open_for(network: FeatureNetwork, path: str | Path) -> ImageSet:
    """The images in `path`, of a size and colours that `network` takes; else InputError."""
    wanted = network.image_shape
    found = open_images(path, channels=wanted[-1] if wanted else None)
    if not network.accepts(found.shape):
        sizes = ["x".join(map(str, shape)) for shape in (found.shape, wanted or ())]
        raise InputError(
            f"{path}: images {sizes[0]}, {network.name} takes {sizes[1]}: name another network "
            "(--features)"
        )
    return found


def extract(network: FeatureNetwork, images: ImageSet, *, logits: bool = True) -> Features:
    """Outputs of all `images`, read and passed on in batches; without `logits` those are None.

    Warns about images of a single value. Raises InputError as the set's `batches` do.
    """
    whole: list[Any] = []
    done = constant = 0
    with tqdm(total=images.count, desc=f"features of {images.path}", unit="image") as bar:
        for batch in images.batches(network.batch):
            flat = batch.reshape(len(batch), -1)
            constant += int(np.count_nonzero((flat == flat[:, :1]).all(axis=1)))
            part = networks.collect(network, batch)
            part = part if logits else part._replace(logits=None)
            # Filled in place: joining parts would need twice the room.
            whole = whole or [x if x is None else _room(x, images.count) for x in part]
            for rows, array in zip(part, whole, strict=True):
                if array is not None:
                    array[done : done + len(batch)] = rows
            done += len(batch)
            bar.update(len(batch))
    if constant:
        warnings.warn(
            f"{images.path}: {constant} of {images.count} images are a single constant value",
            stacklevel=3,
        )
    return Features(*whole)


def save_statistics(path: str | Path, outputs: Features, network_hash: str) -> None:
    """Write mean and covariance of `outputs` as `statistics.save` does, and `network`, the hash by
    which statistics of other features are refused."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    spatial = None if outputs.spatial is None else statistics.moments(outputs.spatial)
    statistics.save(path, statistics.moments(outputs.features), spatial=spatial)
    save_arrays(path, {**load_arrays(path), "network": np.array(network_hash)})


def _room(part: np.ndarray, count: int) -> np.ndarray:
    return np.empty((count, *part.shape[1:]), part.dtype)


def _reference(
    name: str | Path, network: FeatureNetwork, shape: tuple[int, int, int]
) -> tuple[Given, dict[str, Any]]:
    """(a Given with the reference's part, what the protocol says of it)."""
    if not name:
        return Given(), {"reference": "", "reference_count": None}
    path = Path(name)
    if _holds_statistics(path):
        found: Any = _stored(path, network, shape)
    elif path.exists():
        found = _of_images(path, network)
    else:
        shipped = sorted(file.stem for file in networks.ZOO.glob("*_reference.npz"))
        if str(name) not in shipped:
            raise InputError(
                f"reference {str(name)!r}: no such file or folder, and not one that ships: "
                f"{', '.join(shipped)}"
            )
        found = networks.load_reference(str(name), network=network)
    spatial_mean = getattr(found, "spatial_mean", None)
    given = Given(
        reference=frechet.target(found.train_mean, found.train_cov),
        spatial_reference=None
        if spatial_mean is None
        else frechet.target(spatial_mean, found.spatial_cov),
        reference_features=found.train_features,
    )
    return given, {"reference": str(name), "reference_count": found.num_train}


def _of_images(path: Path, network: FeatureNetwork) -> statistics.Reference:
    found = extract(network, open_for(network, path), logits=False)
    moments = statistics.moments(found.features)
    spatial = None if found.spatial is None else statistics.moments(found.spatial)
    return statistics.Reference(
        moments.mean,
        moments.cov,
        moments.count,
        None if spatial is None else spatial.mean,
        None if spatial is None else spatial.cov,
        train_features=found.features,
    )


def _stored(
    path: Path, network: FeatureNetwork, shape: tuple[int, int, int]
) -> statistics.Reference:
    outputs = jax.eval_shape(network.apply, jax.ShapeDtypeStruct((1, *shape), np.uint8))
    return statistics.load(path, dimensions=outputs.features.shape[-1], network=network)


def _holds_statistics(path: Path) -> bool:
    """Whether `path` is an .npz of mu and sigma. Where it has images too, they are what counts."""
    if path.suffix != ".npz" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
    return names >= {"mu", "sigma"} and ARRAY not in names

"""Image sets prepared once by tensorflow-datasets as array_record files, without TensorFlow.

Each example carries `id`, its place in the original files: tensorflow-datasets stores examples in
the order of a hash. `local` sets are read from archives in a folder of the user's, `download`
sets from the originals that tensorflow-datasets fetches. This module imports
tensorflow-datasets, which is why `mpqdiff.data` imports it only when something must be prepared.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.download.util import DownloadError
from tqdm import tqdm

from mpqdiff.data import DATASETS, archives
from mpqdiff.data.archives import Examples
from mpqdiff.errors import InputError

CHUNK = 1000  # examples decoded per call
ENCODING = tfds.features.Encoding.BYTES  # the default stores every pixel as an int64


class ImageBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The parts that image sets share. Subclasses name their files and readers, by source."""

    FILES: ClassVar[Mapping[str, tuple[str, ...]]]
    READERS: ClassVar[Mapping[str, Callable[[Mapping[str, Path], str], Examples]]]
    URL: ClassVar[str]
    CITATION: ClassVar[str]

    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        tfds.core.BuilderConfig(name="local", description="From archives in a local folder."),
        tfds.core.BuilderConfig(name="download", description="From the original archives."),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put the archives into the folder named by manual_dir."

    @property
    def source(self) -> str:
        """Where the set is read from: "local" or "download"."""
        assert self.builder_config is not None
        return self.builder_config.name

    def _info(self) -> tfds.core.DatasetInfo:
        known = DATASETS[self.name]
        features = {
            "id": tfds.features.Scalar(np.int64),
            "image": tfds.features.Tensor(
                shape=known.image_shape, dtype=np.uint8, encoding=ENCODING
            ),
            "label": tfds.features.ClassLabel(num_classes=known.num_classes),
            "inexact": tfds.features.Scalar(np.bool_),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            citation=self.CITATION,
        )

    def _split_generators(self, dl_manager):
        names = self.FILES[self.source]
        if self.source == "local":
            files = archives.local_files(Path(dl_manager.manual_dir), names)
        else:
            paths = dl_manager.download({name: self.URL + name for name in names})
            files = {name: Path(path) for name, path in paths.items()}
        return {split: self._generate_examples(files, split) for split in ("train", "test")}

    def _generate_examples(self, files, split):
        examples = self.READERS[self.source](files, split)
        for index, (image, label, inexact) in enumerate(zip(*examples, strict=True)):
            yield index, {"id": index, "image": image, "label": int(label), "inexact": inexact}


def prepare(builder: ImageBuilder, folder: Path | None) -> None:
    """Write the array_record files unless they are complete; `folder` holds the local archives.

    tensorflow-datasets writes beside the final folder and renames it when complete, so a killed
    run is simply repeated. Raises InputError on unusable archives, a failed download, or a folder
    that cannot be written.
    """
    if builder.is_prepared():
        return
    if folder is not None:  # before anything is written, and for all splits at once
        archives.local_files(folder, builder.FILES["local"])
    config = tfds.download.DownloadConfig(
        manual_dir=None if folder is None else str(folder), try_download_gcs=False
    )
    try:
        builder.download_and_prepare(file_format="array_record", download_config=config)
    except (OSError, DownloadError, NonMatchingChecksumError) as error:
        raise InputError(
            f"cannot prepare {builder.name} in {builder.data_path}: {error}. Name a writable "
            f"cache folder with room for it, and a folder with {', '.join(builder.FILES['local'])}"
            " or a network that reaches " + builder.URL
        ) from error


def read_back(builder: ImageBuilder, split: str) -> Examples:
    """The prepared `split` in original order. Raises InputError where the files are damaged."""
    try:
        source = cast(Any, builder).as_data_source(split=split)
        parts = []
        starts = range(0, len(source), CHUNK)
        for start in tqdm(starts, desc=f"read {builder.name} {split}", delay=2.0):
            rows = source.__getitems__(list(range(start, min(start + CHUNK, len(source)))))
            parts.append({key: np.stack([row[key] for row in rows]) for key in rows[0]})
        columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    except (OSError, RuntimeError, LookupError, ValueError) as error:
        raise InputError(
            f"the prepared set in {builder.data_path} cannot be read ({error}): delete that "
            "folder and run again"
        ) from error
    order = np.argsort(columns["id"])
    if not np.array_equal(columns["id"][order], np.arange(len(order))):
        raise InputError(
            f"the prepared set in {builder.data_path} lacks examples or repeats them: delete that "
            "folder and run again"
        )
    images, labels, inexact = (columns[key][order] for key in ("image", "label", "inexact"))
    return Examples(images, labels.astype(np.int32), inexact)

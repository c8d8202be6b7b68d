"""CIFAR-100: 50 000 and 10 000 colour pictures, 32 x 32, 100 classes (the fine labels)."""

from typing import ClassVar

from mpqdiff.data import DATASETS, archives
from mpqdiff.data.prepare import ImageBuilder, tfds


class Cifar100(ImageBuilder, skip_registration=True):
    """CIFAR-100 from the original binary archive, a folder's or downloaded."""

    VERSION = tfds.core.Version(DATASETS["cifar100"].version)
    URL = "https://www.cs.toronto.edu/~kriz/"
    FILES: ClassVar = dict.fromkeys(("local", "download"), tuple(archives.CIFAR100_BINARY))
    READERS: ClassVar = dict.fromkeys(("local", "download"), archives.read_cifar100)
    CITATION = "Krizhevsky: Learning multiple layers of features from tiny images, 2009"

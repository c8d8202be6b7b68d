"""CIFAR-10: 50 000 and 10 000 colour pictures, 32 x 32, ten classes.

The local arrays are a stand-in: 86 training and 25 test images are JPEG decodes of the originals
(error of about 7 of 255 a pixel), marked `inexact`. The downloaded archive is the original.
"""

from typing import ClassVar

from mpqdiff.data import DATASETS, archives
from mpqdiff.data.prepare import ImageBuilder, tfds


class Cifar10(ImageBuilder, skip_registration=True):
    """CIFAR-10 from the original binary archive, or from arrays of nearly all its images."""

    VERSION = tfds.core.Version(DATASETS["cifar10"].version)
    URL = "https://www.cs.toronto.edu/~kriz/"
    FILES: ClassVar = {
        "local": (*archives.CIFAR10_FILES["train"], archives.CIFAR10_FILES["test"][0]),
        "download": tuple(archives.CIFAR10_BINARY),
    }
    READERS: ClassVar = {"local": archives.read_cifar10, "download": archives.read_cifar10_binary}
    CITATION = "Krizhevsky: Learning multiple layers of features from tiny images, 2009"

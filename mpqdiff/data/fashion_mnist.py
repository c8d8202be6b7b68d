"""Fashion-MNIST: 60 000 and 10 000 grey pictures of clothes, 28 x 28, ten classes."""

from typing import ClassVar

from mpqdiff.data import DATASETS, archives
from mpqdiff.data.prepare import ImageBuilder, tfds


class FashionMnist(ImageBuilder, skip_registration=True):
    """Fashion-MNIST from its four original archives (Zalando SE, MIT licence)."""

    VERSION = tfds.core.Version(DATASETS["fashion_mnist"].version)
    URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
    FILES: ClassVar = {
        "local": tuple(archives.FASHION_MNIST),
        "download": tuple(archives.FASHION_MNIST),
    }
    READERS: ClassVar = {
        "local": archives.read_fashion_mnist,
        "download": archives.read_fashion_mnist,
    }
    CITATION = "Xiao, Rasul, Vollgraf: Fashion-MNIST, 2017, arXiv 1708.07747"

"""CLIP score (Hessel et al. 2021): how well images fit their captions, by a user's own network.

    score_i = 100 max(cos(image embedding_i, text embedding_i), 0)

The embeddings come from whatever image and text encoders the user has (CLIP ViT-L/14 is usual);
none is shipped. Numbers of different encoders do not compare: name the encoder with the score.
"""

import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.evaluate.statistics import finite_features


def clip_scores(image_embeddings, text_embeddings) -> np.ndarray:
    """Score of each pair, [n] in 0 to 100, of two sets of embeddings [n,D], paired by row.

    Raises InputError on different shapes, values that are not finite, or an embedding of 0.
    """
    images = finite_features(image_embeddings, "image embeddings").astype(np.float64)
    texts = finite_features(text_embeddings, "text embeddings").astype(np.float64)
    if images.shape != texts.shape:
        raise InputError(
            f"got image embeddings {images.shape} and text embeddings {texts.shape}, expected "
            "equal [n,D]: one caption per image, both projected to the encoder's common space"
        )
    lengths = np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    if not lengths.all():
        raise InputError(f"{np.count_nonzero(lengths == 0)} of {len(lengths)} embeddings are 0")
    return 100.0 * np.maximum(np.sum(images * texts, axis=1) / lengths, 0.0)

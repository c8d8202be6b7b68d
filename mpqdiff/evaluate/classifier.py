"""The small classifier whose trained weights are embedded: a feature space of its own."""

import flax.linen as nn

from mpqdiff.images import from_uint8


class ImageClassifier(nn.Module):
    """Convolutions with max pooling, a linear layer of `num_features`, a linear head over it.

    The penultimate layer has no activation of its own: its covariance then has full rank, where
    rectified units that never fire would make it singular. Products run at the highest
    precision, so that features agree between CPU, GPU and TPU.
    """

    image_shape: tuple[int, int, int]
    convolutions: tuple[tuple[int, int, int], ...]  # (width, window, pool size)
    num_features: int
    num_classes: int

    @nn.compact
    def __call__(self, images):
        """`images` uint8 [n,H,W,C] -> (features float32 [n,D], logits float32 [n,classes])."""
        x = from_uint8(images)
        for width, window, pool in self.convolutions:
            x = nn.Conv(width, (window, window), use_bias=False, precision="highest")(x)
            n, height, breadth, _ = x.shape
            x = x.reshape(n, height // pool, pool, breadth // pool, pool, width).max((2, 4))
            x = nn.relu(nn.GroupNorm(8)(x))
        x = x.reshape(x.shape[0], -1)
        features = nn.Dense(self.num_features, precision="highest", name="features")(x)
        logits = nn.Dense(self.num_classes, precision="highest", name="logits")(features)
        return features, logits

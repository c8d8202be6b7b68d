"""Inception score (Salimans et al. 2016): exp(mean_i KL(p(y|x_i) || p(y))), from logits.

Between 1 (no information) and the number of classes. Computed on the whole set; the usual ten
splits lower it at small n, so the number of splits belongs to the protocol.
"""

import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.evaluate.frechet import finite_features


def inception_score(logits, *, splits: int = 1) -> float:
    """Score of `logits` [n,classes], mean over `splits` consecutive equal parts.

    Raises InputError unless 1 <= splits <= n and the logits are finite.
    """
    logits = finite_features(logits, "logits")
    if not 1 <= splits <= len(logits):
        raise InputError(f"got splits={splits} for {len(logits)} images, expected 1 to n")
    log_p = logits - logits.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    return float(np.mean([_score(part) for part in np.array_split(log_p, splits)]))


def _score(log_p) -> float:
    p = np.exp(log_p)
    marginal = p.mean(axis=0)
    # A class of probability 0 everywhere contributes 0 to the divergence, not NaN.
    log_marginal = np.log(np.where(marginal > 0, marginal, 1.0))
    return float(np.exp(np.mean(np.sum(p * (log_p - log_marginal), axis=1))))

"""How much each site matters, and when: one file per score, each returning `Scores`.

The scores need different inputs (their signatures say which), so the caller supplies them.
"""

from mpqdiff.sensitivity import (
    eps_error,
    manifold_score,
    orthogonality,
    output_error,
    random,
    rollout_error,
    weight_error,
)

SCORES = {
    "orthogonality": orthogonality.score,
    "weight_error": weight_error.score,
    "output_error": output_error.score,
    "eps_error": eps_error.score,
    "rollout_error": rollout_error.score,
    "manifold": manifold_score.score,
    "random": random.score,
}

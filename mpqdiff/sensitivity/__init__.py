"""How much each site matters, and when: one file per score, each returning `Scores`.

The scores need different inputs (their signatures say which), so the caller supplies them.
"""

from mpqdiff.sensitivity import orthogonality, output_error, random, weight_error

SCORES = {
    "orthogonality": orthogonality.score,
    "output_error": output_error.score,
    "weight_error": weight_error.score,
    "random": random.score,
}

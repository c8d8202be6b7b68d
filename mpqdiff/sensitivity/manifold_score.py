"""Manifold score: DiffPro's combined sensitivity of each site, times the error of each choice.

    damage[l,b] = C_l q_l(b),   q_l(b) = E ||y' - y||^2 / E ||y||^2

with C_l the weighted mean of the site's signals by rank (see `manifold` for these, `ranking` for
it): a ranking alone says nothing of widths. It is local: it cannot know whether anything reads the
output.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from mpqdiff.errors import InputError, unknown_name
from mpqdiff.records import Scores
from mpqdiff.sensitivity import damage, ranking
from mpqdiff.sites import Site

PCA = ("leak", "rotate", "concentration")


def signals(
    recorded: Mapping,
    *,
    pca: str = "leak",
    normalisation: str = "rank",
    weights: Mapping | None = None,
) -> dict[str, np.ndarray]:
    """The signals of each of the M sites of `manifold_record.record`, and their `combined` score.

    {energy, dimension, k, features, pca, growth, combined}, float64 [M]. pca (of `PCA`) and growth
    are those of the site's narrowest choice, where they say most. See `ranking.combined` for
    normalisation and weights. Raises InputError like it, and on an unknown `pca` or one that was
    not recorded.
    """
    if pca not in PCA:
        raise unknown_name("PCA sensitivity", pca, PCA)
    if pca not in recorded:
        raise InputError(f"pca={pca!r} was not recorded: record with {pca}=True")
    pairs = np.asarray(recorded["pair"])
    first = np.searchsorted(pairs[:, 0], recorded["site"])
    found = {
        "energy": np.asarray(recorded["energy"]),
        "pca": np.asarray(recorded[pca])[first] if pca == "leak" else np.asarray(recorded[pca]),
        "dimension": recorded["k"] / recorded["features"],
        "growth": np.asarray(recorded["growth"])[first],
    }
    combined = ranking.combined(found, weights=weights, normalisation=normalisation)
    sizes = {name: np.asarray(recorded[name]) for name in ("k", "features")}
    return found | sizes | {"combined": combined}


def score(recorded: Mapping, sites: Sequence[Site], choices, legal, **readings) -> Scores:
    """Damage [1,L,K] = C_l q_l(b), over all timesteps: the combined score of the site's signals
    times the relative error of its outputs.

    recorded: `manifold_record.record` of the same sites, choices and legal; readings: as `signals`
    takes them. The site of least score has no damage at any choice. Raises InputError as that does.
    """
    pairs = damage.measured(sites, choices, legal)
    if not pairs:
        return damage.scores("manifold", np.zeros((1, 0)), pairs, sites, choices, legal)
    if np.asarray(recorded["pair"]).tolist() != [list(pair) for pair in pairs]:
        raise InputError("manifold score: recorded for other sites or choices: record it again")
    combined = dict(
        zip(np.asarray(recorded["site"]), signals(recorded, **readings)["combined"], strict=True)
    )
    found = np.array([combined[site] for site, _ in pairs]) * recorded["error"]
    return damage.scores("manifold", found[None], pairs, sites, choices, legal)

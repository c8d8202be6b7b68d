"""Perceptual distance and CLIP score: closed forms, invariances, plain loops, bad input."""

import math

import numpy as np
import pytest

from mpqdiff.errors import InputError
from mpqdiff.evaluate.perceptual import distances
from mpqdiff.evaluate.text_alignment import clip_scores


def _slow(a, b):
    """One image's distance in one layer [H,W,C], position by position."""
    total = 0.0
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            u, v = a[i, j], b[i, j]
            total += np.sum((u / np.linalg.norm(u) - v / np.linalg.norm(v)) ** 2)
    return total / (a.shape[0] * a.shape[1])


def test_layers_add_up_and_equal_the_plain_loops():
    rng = np.random.default_rng(0)
    ours = [rng.normal(size=(300, 4, 3, 6)).astype(np.float32), rng.normal(size=(300, 5))]
    base = [rng.normal(size=(300, 4, 3, 6)).astype(np.float32), rng.normal(size=(300, 5))]
    found = distances(ours, base)
    np.testing.assert_allclose(found, distances(ours[:1], base[:1]) + distances(ours[1:], base[1:]))
    for i in (0, 255, 299):
        assert distances(ours[:1], base[:1])[i] == pytest.approx(_slow(ours[0][i], base[0][i]))


def test_known_angles():
    """2 (1 - cosine): 0 for equal directions of any length, 2 at right angles, 4 for opposite."""
    base = np.array([[1.0, 0.0]] * 4)
    ours = np.array([[5.0, 0.0], [0.0, 0.1], [-2.0, 0.0], [1.0, 1.0]])
    expected = [0.0, 2.0, 4.0, 2 - math.sqrt(2)]
    np.testing.assert_allclose(distances([ours], [base]), expected, atol=1e-12)
    np.testing.assert_allclose(distances([base], [ours]), expected, atol=1e-12)


def test_an_all_zero_activation_is_no_nan():
    zero = np.zeros((2, 3))
    assert distances([zero], [zero]).tolist() == [0.0, 0.0]
    assert distances([zero], [np.ones((2, 3))]) == pytest.approx(1.0)


def test_grows_with_noise():
    rng = np.random.default_rng(1)
    base = rng.normal(size=(50, 16))
    noise = rng.normal(size=(50, 16))
    little, much = (distances([base + s * noise], [base]).mean() for s in (0.05, 0.5))
    assert 0.0 < little < 0.1 * much


def test_unusable_activations():
    x = np.ones((4, 3))
    with pytest.raises(InputError, match="1 and 2 layers"):
        distances([x], [x, x])
    with pytest.raises(InputError, match="at least 1"):
        distances([], [])
    with pytest.raises(InputError, match="seeds that both arms have"):
        distances([x], [x[:2]])
    y = x.copy()
    y[2, 1] = np.nan
    with pytest.raises(InputError, match="1 of 4 images"):
        distances([x], [y])


def test_clip_scores_of_known_angles():
    texts = np.array([[1.0, 0.0]] * 4)
    images = np.array([[3.0, 0.0], [1.0, 1.0], [0.0, 2.0], [-1.0, 0.0]])
    expected = [100.0, 100 / math.sqrt(2), 0.0, 0.0]
    np.testing.assert_allclose(clip_scores(images, texts), expected, atol=1e-12)
    np.testing.assert_allclose(clip_scores(images, 7 * texts), expected, atol=1e-12)


def test_clip_scores_pair_by_row():
    rng = np.random.default_rng(2)
    images = rng.normal(size=(5, 8)).astype(np.float32)
    found = clip_scores(images, images[::-1])
    assert found[2] == pytest.approx(100.0)
    assert found[0] == pytest.approx(found[4])


def test_unusable_embeddings():
    x = np.ones((3, 4))
    with pytest.raises(InputError, match="one caption per image"):
        clip_scores(x, x[:2])
    with pytest.raises(InputError, match="text embeddings: 1 of 3 rows"):
        clip_scores(x, np.where(np.arange(12).reshape(3, 4) == 5, np.nan, 1.0))
    with pytest.raises(InputError, match="1 of 3 embeddings are 0"):
        clip_scores(x * [[1], [0], [1]], x)

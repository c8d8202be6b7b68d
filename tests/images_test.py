"""The uint8 boundary: every level survives, rounding is half to even, files are lossless."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mpqdiff import images
from mpqdiff.errors import InputError


def test_every_level_survives_the_round_trip():
    levels = np.arange(256, dtype=np.uint8)
    floats = images.from_uint8(levels)
    assert floats.dtype == np.float32
    np.testing.assert_array_equal(images.to_uint8(floats), levels)


def test_black_grey_and_white():
    np.testing.assert_array_equal(images.to_uint8(np.array([-1.0, 0.0, 1.0])), [0, 128, 255])
    np.testing.assert_array_equal(images.from_uint8(np.array([0, 255], np.uint8)), [-1.0, 1.0])


def test_rounds_half_to_even_and_clips():
    near = (2 * np.arange(255) + 1) / 255 - 1
    x = np.concatenate([np.float32(near) + np.float32(k * 2.0**-25) for k in range(-4, 5)])
    halfway = x[(x + np.float32(1.0)) * np.float32(127.5) % 1 == 0.5]
    assert len(halfway) > 100
    assert not (images.to_uint8(halfway) % 2).any()
    np.testing.assert_array_equal(images.to_uint8(np.array([-7.0, 7.0])), [0, 255])


def test_takes_device_arrays_of_any_float_width():
    x = jnp.array([-1.0, 0.5, 1.0])
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        np.testing.assert_array_equal(images.to_uint8(x.astype(dtype)), [0, 191, 255])


def test_refuses_what_is_already_scaled_or_not_finite():
    with pytest.raises(InputError, match="dtype uint8"):
        images.to_uint8(np.zeros((2, 2), np.uint8))
    with pytest.raises(InputError, match="2 of 4 pixels"):
        images.to_uint8(np.array([0.0, np.nan, np.inf, 1.0]))
    with pytest.raises(InputError, match="expected uint8"):
        images.from_uint8(np.zeros(3, np.float32))
    with pytest.raises(InputError, match="expected uint8"):
        images.grid(np.zeros((2, 4, 4, 1)))


@pytest.mark.parametrize("channels", [1, 3])
def test_png_is_lossless(tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 256, (9, 7, channels), dtype=np.uint8)
    image[0, 0], image[0, 1], image[0, 2] = 0, 128, 255
    images.save_png(tmp_path / "deep" / "one.png", image)
    read = np.asarray(Image.open(tmp_path / "deep" / "one.png"))
    np.testing.assert_array_equal(read.reshape(9, 7, channels), image)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["one.png"]


def test_grid_places_each_image_row_by_row(tmp_path):
    tiles = np.stack([np.full((4, 5, 1), value, np.uint8) for value in (10, 128, 255, 40, 50)])
    images.save_grid(tmp_path / "grid.png", tiles, columns=3, gap=1)
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    assert picture.shape == (2 * 4 + 1, 3 * 5 + 2)
    for index, value in enumerate((10, 128, 255, 40, 50, 0)):
        top, left = index // 3 * 5, index % 3 * 6
        assert (picture[top : top + 4, left : left + 5] == value).all()
    assert not picture[4].any()
    assert images.grid(tiles).shape == (2 * 4 + 1, 3 * 5 + 2, 1)


def test_unusable_shapes(tmp_path):
    with pytest.raises(InputError, match=r"\[H,W,1\]"):
        images.save_png(tmp_path / "x.png", np.zeros((4, 4, 2), np.uint8))
    with pytest.raises(InputError, match="n >= 1"):
        images.grid(np.zeros((0, 4, 4, 1), np.uint8))
    with pytest.raises(InputError, match="columns=0"):
        images.grid(np.zeros((2, 4, 4, 1), np.uint8), columns=0)
    assert not list(tmp_path.iterdir())


def test_every_level_survives_inside_a_compiled_function():
    levels = np.arange(256, dtype=np.uint8)
    floats = jax.jit(images.from_uint8)(levels)
    assert isinstance(floats, jax.Array)
    np.testing.assert_array_equal(images.to_uint8(floats), levels)
    np.testing.assert_allclose(floats, images.from_uint8(levels), rtol=0, atol=2.5e-7)
    with pytest.raises(InputError, match="expected uint8"):
        jax.jit(images.from_uint8)(levels.astype(np.int32))
    with pytest.raises(InputError, match="expected uint8"):
        images.from_uint8([0, 1])


def test_nothing_else_in_the_package_makes_pixels_of_floats_or_the_reverse():
    """A second conversion somewhere is how images get washed out."""
    package = Path(images.__file__).parent
    scaling = re.compile(r"[*/] *\(?(j?np\.float32\()?(127\.5|255|127\.0|128\.0)\b(?! *\*)")
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if scaling.search(path.read_text())
    }
    assert found == {"images.py"}

"""What images are conditioned on: pools of labels and texts, and every unusable file of them."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mpqdiff import conditioning
from mpqdiff.config import base
from mpqdiff.errors import InputError
from mpqdiff.models import DiT, PixArt, UNet
from mpqdiff.models.pixart import Caption

DIT = DiT(image_size=8, channels=1, patch=4, width=16, depth=1, num_heads=2, num_classes=3)
PIXART = PixArt(image_size=8, channels=4, patch=2, width=24, depth=1, num_heads=2, text_width=6)
CONTEXT = UNet(
    image_size=8, channels=4, widths=(8,), groups=4, condition="context", context_width=6
)
PLAIN = UNet(image_size=8, channels=4, widths=(8,), groups=4)
TOKENS = np.random.default_rng(0).normal(size=(3, 5, 6)).astype(np.float32)


def config(text="", guidance=1.0, weights="file"):
    found = base()
    found.text, found.weights, found.diffusion.guidance_scale = text, weights, guidance
    return found


def saved(tmp_path, **arrays):
    path = tmp_path / "prompts.npz"
    np.savez(path, **arrays)
    return str(path)


def test_labels_run_through_the_classes_and_the_null_label_follows_them():
    found = conditioning.load(config(), DIT)
    np.testing.assert_array_equal(found.take(2, 5), [2, 0, 1, 2, 0])
    np.testing.assert_array_equal(found.mixed(0, 5), [0, 3, 2, 3, 1])


def test_a_model_without_conditions_gets_zeros_and_no_guidance():
    np.testing.assert_array_equal(conditioning.load(config(), PLAIN).take(0, 3), [0, 0, 0])
    with pytest.raises(InputError, match=r"guidance_scale=2 needs a null condition.*set it to 1"):
        conditioning.load(config(guidance=2.0), PLAIN)


def test_labels_without_a_null_class_have_no_guidance():
    unet = UNet(
        image_size=8, channels=1, widths=(8,), groups=4, condition="label", num_classes=3,
        null_class=False,
    )  # fmt: skip
    np.testing.assert_array_equal(conditioning.load(config(), unet).take(0, 4), [0, 1, 2, 0])
    with pytest.raises(InputError, match="null condition"):
        conditioning.load(config(guidance=2.0), unet)


@pytest.mark.parametrize("module", [PIXART, CONTEXT], ids=["caption", "context"])
def test_prompts_of_a_file_in_turn_each_with_its_mask(tmp_path, module):
    mask = np.tril(np.ones((5, 5)))[[0, 2, 4]]
    null, null_mask = TOKENS[0] * 0.1, np.eye(5)[0]
    path = saved(tmp_path, embeddings=TOKENS, mask=mask, null=null, null_mask=null_mask)
    found = conditioning.load(config(path, guidance=3.0), module)
    taken, mixed = found.take(2, 2), found.mixed(2, 2)
    if module is CONTEXT:
        np.testing.assert_array_equal(taken, TOKENS[[2, 0]])
        np.testing.assert_array_equal(mixed, np.stack([TOKENS[2], null]))
        return
    assert isinstance(taken, Caption)
    np.testing.assert_array_equal(taken.embeddings, TOKENS[[2, 0]])
    np.testing.assert_array_equal(taken.mask, mask[[2, 0]])
    np.testing.assert_array_equal(mixed.embeddings, np.stack([TOKENS[2], null]))
    np.testing.assert_array_equal(mixed.mask, np.stack([mask[2], null_mask]))


def test_sizes_of_a_pixart_that_is_told_them(tmp_path):
    told = PIXART.clone(size_conditions=True)
    taken = conditioning.load(config(saved(tmp_path, embeddings=TOKENS)), told).take(0, 2)
    np.testing.assert_array_equal(taken.resolution, [[64.0, 64.0]] * 2)
    np.testing.assert_array_equal(taken.aspect_ratio, [[1.0]] * 2)


def test_only_random_weights_get_random_prompts():
    found = conditioning.load(config(weights="random", guidance=2.0), CONTEXT)
    assert found.take(0, 4).shape == (4, 4, 6)
    shapes = found.input_shapes((8, 8, 4), 2)
    assert [leaf.shape for leaf in jax.tree.leaves(shapes)] == [(2, 8, 8, 4), (), (2, 4, 6)]
    with pytest.raises(InputError, match=r"the model reads text: set config\.text"):
        conditioning.load(config(), CONTEXT)


BAD = {
    "another width": (dict(embeddings=TOKENS[..., :4]), "embeddings .3, 5, 4., the model takes"),
    "no embeddings": (dict(prompts=TOKENS), "expected `embeddings`"),
    "no prompts": (dict(embeddings=TOKENS[:0]), "embeddings .0, 5, 6."),
    "a mask of another length": (dict(embeddings=TOKENS, mask=np.ones((3, 4))), "mask .3, 4."),
    "a null of another length": (dict(embeddings=TOKENS, null=TOKENS[0, :2]), "null of embeddings"),
    "NaN": (dict(embeddings=TOKENS * np.nan), "finite"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_unusable_file_of_prompts_is_named(tmp_path, case):
    arrays, message = BAD[case]
    with pytest.raises(InputError, match=message):
        conditioning.load(config(saved(tmp_path, **arrays)), CONTEXT)


def test_a_missing_or_damaged_file_of_prompts_is_named(tmp_path):
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(b"PK\x03\x04 not a zip")
    for path in (str(damaged), str(tmp_path / "absent.npz")):
        with pytest.raises(InputError, match=r"no readable \.npz"):
            conditioning.load(config(path), CONTEXT)
    with pytest.raises(InputError, match="add `null` to"):
        conditioning.load(config(saved(tmp_path, embeddings=TOKENS), guidance=2.0), CONTEXT)


def test_a_module_of_the_users_own_without_classes_is_unconditional():
    found = conditioning.load(config(), SimpleNamespace(image_size=8, channels=1))
    np.testing.assert_array_equal(found.take(0, 2), [0, 0])

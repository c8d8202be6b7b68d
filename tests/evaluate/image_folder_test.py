"""Sets of images on disk: pixels as stored, in order, in batches; what cannot be used is named."""

import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from mpqdiff import images as pictures
from mpqdiff.errors import InputError
from mpqdiff.evaluate.image_folder import open_images, read_image, write_images


def pixels(count=7, shape=(6, 5, 3), seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)
    images[0, 0, :3, :] = np.array([0, 128, 255])[:, None]  # black, grey, white
    return images


def all_of(found, size=3):
    return np.concatenate(list(found.batches(size)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["folder", "images.npz"])
def test_samples_survive_the_disk(tmp_path, name, channels):
    x_0 = pictures.from_uint8(pixels(shape=(6, 5, channels)))
    write_images(tmp_path / name, pictures.to_uint8(x_0))
    found = open_images(tmp_path / name)
    assert (found.count, found.shape) == (7, (6, 5, channels))
    for size in (3, 7, 100):
        batches = list(found.batches(size))
        assert [len(batch) for batch in batches] == [min(size, 7 - i) for i in range(0, 7, size)]
        assert all(batch.dtype == np.uint8 for batch in batches)
        np.testing.assert_array_equal(np.concatenate(batches), pixels(shape=(6, 5, channels)))


def test_arrays_of_every_layout(tmp_path):
    grey = pixels(shape=(6, 5, 1))
    np.save(tmp_path / "plain.npy", grey)
    np.save(tmp_path / "without_channel.npy", grey[..., 0])
    np.savez_compressed(tmp_path / "one.npz", pictures=grey)
    np.savez(tmp_path / "sampled.npz", arr_1=np.arange(7), arr_0=grey)
    for path in sorted(tmp_path.iterdir()):
        found = open_images(path)
        assert (found.count, found.shape) == (7, (6, 5, 1)), path
        np.testing.assert_array_equal(all_of(found), grey)
    write_images(tmp_path / "labelled.npz", grey, labels=np.arange(7))
    with np.load(tmp_path / "labelled.npz") as stored:
        np.testing.assert_array_equal(stored["arr_1"], np.arange(7))
        np.testing.assert_array_equal(stored["arr_0"], grey)


def test_a_folder_is_read_recursively_by_relative_path(tmp_path):
    images = pixels(4)
    names = ["b/0.png", "a/10.PNG", "a/9.png", "c.png"]
    for name, image in zip(names, images, strict=True):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "copy.png").write_bytes(b"no image")
    (tmp_path / "a" / "._9.png").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("no image")
    found = open_images(tmp_path)
    assert found.count == 4
    np.testing.assert_array_equal(all_of(found), images[[1, 2, 0, 3]])


def test_jpeg_is_read_as_pillow_decodes_it(tmp_path):
    Image.fromarray(pixels(1)[0]).save(tmp_path / "a.jpg", quality=90)
    with Image.open(tmp_path / "a.jpg") as picture:
        expected = np.asarray(picture)
    np.testing.assert_array_equal(all_of(open_images(tmp_path))[0], expected)


def test_pixel_formats(tmp_path):
    image = pixels(1)[0]
    path = tmp_path / "a.png"
    opaque = np.dstack([image, np.full((6, 5), 255, np.uint8)])
    Image.fromarray(opaque).save(path)
    np.testing.assert_array_equal(read_image(path), image)
    opaque[2, 3, 3] = 254
    Image.fromarray(opaque).save(path)
    with pytest.raises(InputError, match=r"a\.png: has transparent pixels"):
        read_image(path)
    Image.fromarray(image).quantize(64).save(path)
    with Image.open(path) as picture:
        assert picture.mode == "P"
    assert read_image(path).shape == image.shape
    Image.fromarray(image[..., 0] > 128).save(path)
    np.testing.assert_array_equal(read_image(path)[..., 0], (image[..., 0] > 128) * 255)
    Image.fromarray(image[..., 0].astype(np.uint16) * 257).save(path)
    with pytest.raises(InputError, match=r"a\.png: pixel format I;16, expected 8-bit"):
        read_image(path)


def test_channels_change_only_where_no_colour_does(tmp_path):
    grey = pixels(shape=(6, 5, 1))
    np.save(tmp_path / "grey.npy", grey)
    write_images(tmp_path / "grey", grey)
    for name in ("grey.npy", "grey"):
        found = open_images(tmp_path / name, channels=3)
        assert found.shape == (6, 5, 3)
        np.testing.assert_array_equal(all_of(found), grey.repeat(3, -1))
    np.save(tmp_path / "three.npy", grey.repeat(3, -1))
    np.testing.assert_array_equal(all_of(open_images(tmp_path / "three.npy", channels=1)), grey)
    np.save(tmp_path / "colour.npy", pixels())
    with pytest.raises(InputError, match=r"colour\.npy: has colours"):
        all_of(open_images(tmp_path / "colour.npy", channels=1))
    with pytest.raises(InputError, match="channels=4"):
        open_images(tmp_path / "colour.npy", channels=4)


def test_mixed_sizes_and_colours_name_the_file(tmp_path):
    write_images(tmp_path / "set", pixels(4))
    Image.fromarray(pixels(1, (5, 6, 3))[0]).save(tmp_path / "set" / "000004.png")
    with pytest.raises(InputError, match=r"000004\.png: an image 5x6x3 among images 6x5x3 .*0000"):
        all_of(open_images(tmp_path / "set"))
    Image.fromarray(pixels(1)[0, ..., 0]).save(tmp_path / "set" / "000004.png")
    with pytest.raises(InputError, match=r"000004\.png: an image 6x5x1 among"):
        all_of(open_images(tmp_path / "set"))
    assert all_of(open_images(tmp_path / "set", channels=3)).shape == (5, 6, 5, 3)


def test_unreadable_images_name_the_file(tmp_path):
    write_images(tmp_path, pixels(4, (40, 40, 3)))
    whole = (tmp_path / "000002.png").read_bytes()
    damaged = [whole[:200], b"", b"plain text", whole[:60] + b"\0" * 8 + whole[68:]]
    for payload in damaged:
        (tmp_path / "000002.png").write_bytes(payload)
        with pytest.raises(InputError, match=r"000002\.png: cannot be read as an image"):
            all_of(open_images(tmp_path))
    (tmp_path / "000000.png").write_bytes(b"plain text")
    with pytest.raises(InputError, match=r"000000\.png: cannot be read"):
        open_images(tmp_path)


def test_what_is_no_set_of_images(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: holds no image"):
        open_images(tmp_path / "empty")
    with pytest.raises(InputError, match="nowhere: no such file"):
        open_images(tmp_path / "nowhere")
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(InputError, match=r"a\.zip: expected a folder"):
        open_images(tmp_path / "a.zip")
    np.savez(tmp_path / "two.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    with pytest.raises(InputError, match=r"two\.npz: has the arrays \['mu', 'sigma'\]"):
        open_images(tmp_path / "two.npz")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 4, 4, 3), np.float32), "dtype float32, expected uint8: pass floats"),
        (np.zeros((3, 4, 4, 3), np.int64), "dtype int64, expected uint8"),
        (np.zeros((3, 3, 4, 4), np.uint8), r"shape \(3, 3, 4, 4\), expected \[n,H,W,C\]"),
        (np.zeros((0, 4, 4, 3), np.uint8), "with n, H, W at least 1"),
        (np.zeros((4, 4), np.uint8), r"shape \(4, 4\)"),
        (np.asfortranarray(np.zeros((3, 4, 4, 3), np.uint8)), "in column order"),
        (np.array([{}]), "dtype object"),
    ],
)
def test_arrays_that_hold_no_images(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    np.savez(tmp_path / "a.npz", allow_pickle=True, arr_0=array)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(InputError, match=f"{name}: .*{message}"):
            open_images(tmp_path / name)


def test_damaged_arrays_name_the_file(tmp_path):
    whole, archive = tmp_path / "a.npy", tmp_path / "a.npz"
    np.save(whole, pixels())
    np.savez(archive, pixels(900))  # more than the first read of a member
    payload = whole.read_bytes()
    whole.write_bytes(payload[:-1])
    with pytest.raises(InputError, match=r"a\.npy: cut short"):
        all_of(open_images(whole))
    whole.write_bytes(payload + b"\0")
    with pytest.raises(InputError, match=r"a\.npy: has more bytes"):
        all_of(open_images(whole))
    for kept in (0, 5, 40):
        whole.write_bytes(payload[:kept])
        with pytest.raises(InputError, match=r"a\.npy: not a complete array"):
            open_images(whole)
    payload = bytearray(archive.read_bytes())
    payload[60000] ^= 1
    archive.write_bytes(payload)
    with pytest.raises(InputError, match=r"a\.npz: damaged .*CRC"):
        all_of(open_images(archive))
    archive.write_bytes(payload[:-30])
    with pytest.raises(InputError, match=r"a\.npz: not a complete \.npz"):
        open_images(archive)


def test_a_compressed_set_is_never_whole_in_memory(tmp_path):
    images = np.zeros((4000, 32, 32, 3), np.uint8)  # 12 MB
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("arr_0.npy", "w") as member,
    ):
        np.save(member, images)
    tracemalloc.start()
    counts = [len(batch) for batch in open_images(tmp_path / "a.npz").batches(100)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert counts == [100] * 40
    assert peak < 3e6


def test_writing_refuses_what_would_be_misread(tmp_path):
    with pytest.raises(InputError, match=r"float32 .*to_uint8"):
        write_images(tmp_path / "a.npz", np.zeros((2, 4, 4, 3), np.float32))
    with pytest.raises(InputError, match=r"got labels \(3,\) for 2 images"):
        write_images(tmp_path / "a.npz", pixels(2), labels=np.zeros(3))
    with pytest.raises(InputError, match="holds no labels"):
        write_images(tmp_path / "a", pixels(2), labels=np.zeros(2))
    assert not list(tmp_path.iterdir())
    write_images(tmp_path / "a", pixels(2))
    with pytest.raises(InputError, match="has 2 images already"):
        write_images(tmp_path / "a", pixels(1))
    assert open_images(tmp_path / "a").count == 2

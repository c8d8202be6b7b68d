"""Images on disk against every kind of reference: the numbers of `evaluate`; what is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff.errors import InputError
from mpqdiff.evaluate import evaluate, features, statistics
from mpqdiff.evaluate.features import FeatureNetwork, Features
from mpqdiff.evaluate.image_folder import write_images
from mpqdiff.evaluate.image_metrics import evaluate_images, table

METRICS = ("fid", "kid", "is", "precision", "recall")

N = 96
NEEDS_FEATURES = ("kid", "precision", "recall")


def spatial_network(images):
    """Like Inception: any size, grey or colour, with features that keep places."""
    x = jnp.asarray(images, jnp.float32) / 100
    x = jnp.broadcast_to(x, (*x.shape[:3], 3))
    spatial = x[:, ::10, ::10].reshape(len(x), -1)
    return Features(x.mean((1, 2)), jnp.tanh(spatial[:, :4]), spatial)


SPATIAL = FeatureNetwork("spatial", "5" * 64, spatial_network, None, batch=40, is_fid=True)


def pictures(seed, count=N, level=0):
    """Blurred noise, brighter by `level`."""
    noise = np.random.default_rng(seed).integers(0, 200, (count, 7, 7, 1), np.uint8)
    return noise.repeat(4, axis=1).repeat(4, axis=2) + np.uint8(level)


@pytest.fixture(scope="module")
def network():
    return features.load()


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """{name: path} of generated and real images, as a folder and as arrays."""
    folder = tmp_path_factory.mktemp("sets")
    write_images(folder / "own", pictures(0, level=30))
    write_images(folder / "own.npz", pictures(0, level=30))
    np.save(folder / "real.npy", pictures(1, count=150))
    return folder


def expected(network, own, real):
    """`evaluate`'s numbers of arrays in memory."""
    values, logits = features.extract(network, own)
    target, _ = features.extract(network, real)
    moments = statistics.moments(target)

    class Reference:
        train_mean, train_cov, train_features = moments.mean, moments.cov, target

    return evaluate(images=own, features=values, logits=logits, reference=Reference)


@pytest.mark.parametrize("name", ["own", "own.npz"])
def test_the_numbers_are_those_of_evaluate(network, sets, name):
    row = evaluate_images(sets / name, sets / "real.npy")
    wanted = expected(network, pictures(0, level=30), pictures(1, count=150))
    for metric in METRICS:
        assert row[metric] == pytest.approx(wanted[metric], rel=1e-6), metric
        assert row[f"{metric}_ci"] == pytest.approx(wanted[f"{metric}_ci"], rel=1e-6), metric
        assert row[f"{metric}_ci"][0] <= row[metric] <= row[f"{metric}_ci"][1]
    assert row["n_images"] == N
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    protocol = row["protocol"]
    assert protocol["feature_hash"] == network.hash
    assert (protocol["reference"], protocol["reference_count"]) == (str(sets / "real.npy"), 150)
    assert protocol["image_size"] == [28, 28, 1]
    assert protocol["indicative"] is True
    assert set(protocol["leading"]) == {*METRICS, "sfid", "fid_infinity"}
    assert protocol["is_fid"] is False
    assert row["sfid"] is None


def test_statistics_once_written_stand_in_for_their_images(network, sets, tmp_path):
    first = evaluate_images(sets / "real.npy", out=tmp_path / "deep" / "real.npz")
    assert first["fid"] is None
    assert first["is"] > 1
    row = evaluate_images(sets / "own", tmp_path / "deep" / "real.npz")
    whole = evaluate_images(sets / "own", sets / "real.npy")
    assert row["fid"] == pytest.approx(whole["fid"], rel=1e-9)
    assert row["fid_ci"] == pytest.approx(whole["fid_ci"], rel=1e-9)
    assert row["protocol"]["reference_count"] == 150
    assert all(row[name] is None and row[f"{name}_ci"] is None for name in NEEDS_FEATURES)
    with np.load(tmp_path / "deep" / "real.npz") as stored:  # as other tools read it
        assert stored["mu"].shape == (64,)
        np.testing.assert_allclose(
            stored["sigma"], np.cov(features.extract(network, pictures(1, 150))[0].T), rtol=1e-4
        )
        np.savez(tmp_path / "plain.npz", mu=stored["mu"], sigma=stored["sigma"])
    plain = evaluate_images(sets / "own", tmp_path / "plain.npz")
    assert plain["fid"] == row["fid"]
    assert plain["protocol"]["reference_count"] is None
    assert "unknown number" in table(plain)


def test_against_the_shipped_reference(network, sets):
    row = evaluate_images(sets / "own", "fashion_reference")
    reference = features.load_reference(network=network)
    values, logits = features.extract(network, pictures(0, level=30))
    wanted = evaluate(
        images=pictures(0, level=30), features=values, logits=logits, reference=reference
    )
    for metric in METRICS:
        assert row[metric] == pytest.approx(wanted[metric], rel=1e-6)
    assert row["protocol"]["reference_count"] == 60000


def test_a_set_against_itself(sets):
    row = evaluate_images(sets / "own", sets / "own.npz")
    assert row["fid"] == pytest.approx(0.0, abs=1e-6)
    assert row["precision"] == row["recall"] == 1.0


def test_statistics_of_other_features_are_refused(sets, tmp_path):
    evaluate_images(sets / "real.npy", out=tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as stored:
        arrays = dict(stored)
    np.savez(tmp_path / "other.npz", **arrays | {"network": np.array("0" * 64)})
    with pytest.raises(InputError, match=r"other\.npz: statistics of features of hash 0000"):
        evaluate_images(sets / "own", tmp_path / "other.npz")
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(InputError, match=r"wide\.npz: statistics of 2048 dimensions"):
        evaluate_images(sets / "own", tmp_path / "wide.npz")
    np.savez(tmp_path / "nan.npz", mu=arrays["mu"] * np.nan, sigma=arrays["sigma"])
    with pytest.raises(InputError, match=r"nan\.npz.*NaN"):
        evaluate_images(sets / "own", tmp_path / "nan.npz")


def test_a_file_with_images_and_statistics_counts_as_images(sets, tmp_path):
    np.savez(tmp_path / "both.npz", arr_0=pictures(1, 150), mu=np.zeros(9), sigma=np.eye(9))
    row = evaluate_images(sets / "own", tmp_path / "both.npz")
    assert row["kid"] == evaluate_images(sets / "own", sets / "real.npy")["kid"]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nowhere", r"'nowhere': no such file or folder, and not one that ships: fashion_refer"),
        ("", r"nothing to do: name a reference"),
    ],
)
def test_references_that_are_not_there(sets, reference, message):
    with pytest.raises(InputError, match=message):
        evaluate_images(sets / "own", reference)


def test_images_the_network_does_not_take(sets, tmp_path):
    np.save(tmp_path / "small.npy", np.zeros((4, 8, 8, 1), np.uint8))
    with pytest.raises(InputError, match=r"small\.npy: images 8x8x1, fashion_classifier takes 28x"):
        evaluate_images(tmp_path / "small.npy", sets / "real.npy")
    with pytest.raises(InputError, match=r"small\.npy: images 8x8x1"):
        evaluate_images(sets / "own", tmp_path / "small.npy")
    np.save(tmp_path / "one.npy", pictures(0, 1))
    with pytest.raises(InputError, match=r"one\.npy: holds 1 image, expected at least 2"):
        evaluate_images(tmp_path / "one.npy", sets / "real.npy")
    with pytest.raises(InputError, match=r"--out=a\.txt: expected a name"):
        evaluate_images(sets / "own", out="a.txt")


def test_constant_images_and_few_ones_are_pointed_out(sets, tmp_path):
    images = pictures(0)
    images[[3, 5]] = 128
    np.save(tmp_path / "grey.npy", images)
    with pytest.warns(UserWarning, match=r"grey\.npy: 2 of 96 images are a single constant"):
        evaluate_images(tmp_path / "grey.npy", sets / "real.npy")
    np.save(tmp_path / "few.npy", images[:2])
    with pytest.warns(UserWarning, match="covariance of 2 images has rank 1 of"):
        row = evaluate_images(tmp_path / "few.npy", sets / "real.npy")
    assert row["fid_ci"] is None
    assert row["precision"] is None
    np.save(tmp_path / "real.npy", pictures(1, 20))  # no higher a rank than the images have
    np.save(tmp_path / "few.npy", images[10:40])
    with pytest.warns(UserWarning, match="covariance of 30 images has rank 19 of 19 in 64 dim"):
        evaluate_images(tmp_path / "few.npy", tmp_path / "real.npy")


def test_table(sets):
    row = evaluate_images(sets / "own", sets / "real.npy")
    lines = table(row).splitlines()
    shown = [name for name in row["protocol"]["leading"] if name != "sfid"]
    shown = ["FID" if name == "fid" else name for name in shown if name != "fid_infinity"]
    assert [line.split()[0] for line in lines[:5]] == shown
    assert "a Frechet distance of these features is not the published FID" in lines
    low, high = row["kid_ci"]
    name = "FID (fashion_classifier features)"
    assert f"{'kid':<{len(name)}}  {row['kid']:.6g}  ({low:.6g} to {high:.6g})" in lines
    assert [line for line in lines if "indicative only" in line] == [
        line for line in lines if line.startswith(f"{name}  ")
    ]
    assert row["protocol"]["fid_name"] == name
    assert f"of 96 images 28x28x1 in {sets / 'own'}" in lines
    assert f"against {sets / 'real.npy'} (150 images)" in lines


def test_fid_infinity_is_an_option(sets, monkeypatch):
    """The spatial network has 3 features: 8 times as many images do."""
    assert evaluate_images(sets / "own", sets / "real.npy")["fid_infinity"] is None
    with pytest.raises(InputError, match=r"got 96 images in 64 dimensions .* 512 images"):
        evaluate_images(sets / "own", sets / "real.npy", fid_infinity=True)
    monkeypatch.setattr(features, "load", lambda name, *, weights=None: SPATIAL)
    row = evaluate_images(sets / "own", sets / "real.npy", fid_infinity=True)
    assert row["fid_infinity_ci"][0] < row["fid_infinity"] < row["fid_infinity_ci"][1]
    assert f"FID, infinitely many  {row['fid_infinity']:.6g}" in table(row)


def test_spatial_features_of_a_network_of_any_size(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        features, "load", lambda name, *, weights=None: asked.append((name, weights)) or SPATIAL
    )
    own, real = (
        np.random.default_rng(i).integers(0, 256, (90, 20, 30, 3), np.uint8) for i in (0, 1)
    )
    np.save(tmp_path / "own.npy", own)
    np.save(tmp_path / "real.npy", real)
    row = evaluate_images(
        tmp_path / "own.npy", tmp_path / "real.npy", features="inception", weights="w.pth"
    )
    assert asked == [("inception", "w.pth")]
    given = [np.asarray(x) for x in spatial_network(own)]
    target = spatial_network(real)
    moments, spatial = (statistics.moments(np.asarray(x)) for x in (target[0], target[2]))
    wanted = evaluate(
        images=own,
        features=given[0],
        logits=given[1],
        spatial=given[2],
        reference=statistics.Reference(
            moments.mean, moments.cov, 90, spatial.mean, spatial.cov, np.asarray(target[0])
        ),
    )
    for metric in (*METRICS, "sfid"):
        assert row[metric] == pytest.approx(wanted[metric], rel=1e-4), metric
    assert row["sfid_ci"][0] < row["sfid"] < row["sfid_ci"][1]
    assert "not the published FID" not in table(row)
    assert {"FID  ", "sFID "} <= {line[:5] for line in table(row).splitlines()}
    evaluate_images(tmp_path / "real.npy", out=tmp_path / "real.npz")
    stored = evaluate_images(tmp_path / "own.npy", tmp_path / "real.npz")
    assert stored["sfid"] == pytest.approx(row["sfid"], rel=1e-9)
    np.save(tmp_path / "grey.npy", own[..., :1])
    with pytest.warns(UserWarning, match="rank"):  # three equal channels
        grey = evaluate_images(tmp_path / "grey.npy", tmp_path / "real.npz")
    assert grey["n_images"] == 90

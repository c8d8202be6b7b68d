"""The protocol: JSON, one line per number, what leads, and which protocols may be compared."""

import json

import pytest

from mpqdiff.errors import InputError
from mpqdiff.evaluate import METRICS, protocol


def _protocol(**changes):
    fields = {
        "feature_space": "fashion_classifier", "feature_hash": "ab12", "reference": "fashion_mnist",
        "reference_count": 60000, "n_images": 256, "seeds": range(2), "guidance": 0.0,
        "image_size": (28, 28, 1),
    }  # fmt: skip
    return protocol.protocol(**{**fields, **changes})


def test_protocol_is_json_and_names_everything_in_one_line_per_number():
    fields = _protocol()
    assert json.loads(json.dumps(fields)) == fields
    assert set(fields["numbers"]) == {*METRICS, "delta_fid", "damage"}
    for part in ("fashion_classifier", "ab12", "fashion_mnist", "60000", "256 images", "28x28x1"):
        assert part in fields["numbers"]["fid"]
    assert all("\n" not in line and "seeds 0, 1" in line for line in fields["numbers"].values())


def test_the_kinds_of_metrics_are_those_of_the_dict():
    for name, metric in METRICS.items():
        assert (name in protocol.SET_METRICS) == (metric.kind == "set"), name
        assert (name in protocol.PAIRED_METRICS) == (metric.kind == "paired"), name


@pytest.mark.parametrize("is_fid", [True, False])
def test_fid_alone_is_the_name_for_the_public_weights_alone(is_fid):
    fields = _protocol(is_fid=is_fid)
    assert fields["is_fid"] is is_fid
    name = "FID" if is_fid else "FID (fashion_classifier features)"
    assert fields["fid_name"] == name
    for metric, line in fields["numbers"].items():
        assert line.count("FID") == line.count(name), metric
    assert all(name in fields["numbers"][m] for m in ("fid", "delta_fid", "damage"))


def test_every_set_metric_but_is_says_that_the_reference_is_held_fixed():
    for metric, line in _protocol()["numbers"].items():
        held = METRICS.get(metric, METRICS["fid"]).kind == "set" and metric != "is"
        assert ("held fixed" in line) is held, metric


@pytest.mark.parametrize(("n", "indicative"), [(1999, True), (2000, False)])
def test_few_images_mark_set_metrics_as_indicative(n, indicative):
    fields = _protocol(n_images=n)
    assert fields["indicative"] is indicative
    assert ("indicative" in fields["numbers"]["fid"]) is indicative
    assert "indicative" not in fields["numbers"]["psnr"]


@pytest.mark.parametrize("n", [256, 5000])
def test_paired_error_and_kid_lead_and_fid_comes_last_below_2000_images(n):
    order = _protocol(n_images=n)["leading"]
    assert set(order) == {*METRICS, "delta_fid", "damage"}
    assert order[0] == "x0_mse"
    assert all(METRICS[name].kind == "paired" for name in order[: order.index("kid")])
    assert order.index("kid") < order.index("fid")
    after = set(order[order.index("fid") :])
    frechet = {"fid", "fid_infinity", "delta_fid", "damage", "sfid"}
    assert frechet <= after
    assert (after == frechet) is (n < 2000)


def test_comparable_names_the_fields_that_differ():
    assert protocol.comparable(_protocol(), _protocol()) is True
    with pytest.raises(InputError) as error:
        protocol.comparable(_protocol(), _protocol(n_images=5000, guidance=1.5))
    message = str(error.value)
    assert "n_images: 256 and 5000" in message
    assert "guidance: 0.0 and 1.5" in message
    assert "under one protocol" in message
    for name in ("seeds:", "numbers", "indicative", "leading"):
        assert name not in message


@pytest.mark.parametrize(
    "changes",
    [{"reference": "cifar10"}, {"feature_hash": "cd34"}, {"feature_space": "inception"},
     {"guidance": 4.0}, {"reference_count": 10000}, {"image_size": (32, 32, 3)},
     {"sampler": "ddpm"}],
)  # fmt: skip
def test_other_protocols_are_refused(changes):
    with pytest.raises(InputError, match=f"{next(iter(changes))}: .* under one protocol"):
        protocol.comparable(_protocol(), _protocol(**changes))


@pytest.mark.parametrize("changes", [{"n_images": 5000}, {"seeds": [7]}])
def test_other_numbers_of_images_are_refused_with_an_offer(changes):
    with pytest.raises(InputError, match=r"seeds they share \(on_shared_seeds\)"):
        protocol.comparable(_protocol(), _protocol(**changes))


def test_the_names_of_runs_do_not_matter():
    """results.json adds them to the protocol."""
    first, second = (_protocol() | {"name": name, "publish": True} for name in ("one", "two"))
    del first["is_fid"], first["fid_name"]  # they follow from the features; older files lack them
    assert protocol.comparable(first, second | {"publish": False})


def test_unusable_protocols():
    with pytest.raises(InputError, match="counts >= 1"):
        _protocol(n_images=0)
    with pytest.raises(InputError, match="names"):
        _protocol(feature_space="")
    with pytest.raises(InputError, match="names"):
        _protocol(seeds=[])
    with pytest.raises(InputError, match="unknown metric 'lpips'"):
        protocol.describe(_protocol(), "lpips")

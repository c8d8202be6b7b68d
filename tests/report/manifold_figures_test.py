"""The figures of DiffPro: they draw what they are given, and nothing where nothing was recorded."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import plotly.graph_objects as go
import pytest
from report_test import Page, arm, drawing, in_browser, plan, site

from mpqdiff import report
from mpqdiff import sites as site_list
from mpqdiff.denoiser import Prediction, from_linen
from mpqdiff.errors import InputError
from mpqdiff.quantize import activations, simulate
from mpqdiff.records import Statistics
from mpqdiff.report import manifold, steps
from mpqdiff.sensitivity import manifold_record
from mpqdiff.sites import Site

DRAWN = ("spectra", "energy", "distribution", "ranges", "joint")
EVIL = "blocks/<b>&</script>"
SITES = ["patch_embed", "a", EVIL, "c/scores"]
SPECTRA = ([4.0, 3.0, 2.0, 1.0], [8.0, 2.0], [1.0, 1.0, 1.0])  # of "a", EVIL and "c/scores"
HEALTH = {"clip_rate": {"mean": 0.0123, "max": 0.25, "site": EVIL}, "not_finite": 0, "images": 4}


def signals():
    """Three sites, scored in the order c, a, EVIL; EVIL is the most sensitive."""
    return {
        "paths": np.array(["a", EVIL, "c/scores"]),
        "energy": np.array([1.5, 2.5, -0.5]), "pca": np.array([1e-4, 0.5, 0.01]),
        "dimension": np.array([0.75, 1.0, 1.0]), "growth": np.array([0.0, 0.1, 0.2]),
        "k": np.array([3, 2, 3]), "features": np.array([4, 2, 3]),
        "combined": np.array([0.5, 0.9, 0.1]), "distribution": np.array([2 / 3, 1.0, 1 / 3]),
        "spectrum": manifold_record.spectra(np.concatenate(SPECTRA), [4, 2, 3]),
    }  # fmt: skip


def widths():
    entries = {"patch_embed": (8, 8), "a": (4, 8), EVIL: (8, 8),
               "c/scores": (None, {"lhs": 6, "rhs": 8})}  # fmt: skip
    return {path: {"w_bits": w, "stored_bits": [] if w is None else [w], "a_bits": a}
            for path, (w, a) in entries.items()}  # fmt: skip


def points():
    """joint.json: three plans, and a number of steps at which none fits."""
    found = []
    for count, error, chosen, best in ((50, 0.02, False, False), (20, 0.01, True, True),
                                       (10, 0.9, False, True)):  # fmt: skip
        found.append({
            "steps": count, "status": "feasible", "w_bits": 4.5, "plan": chosen, "front": best,
            "predicted": {"file_bytes": 123456, "bitops": 2e9 * count, "joules": 1.0},
            "error": error, "error_ci": [0.75 * error, 1.5 * error], "relative": error,
        })  # fmt: skip
    none = {"steps": 500, "status": "over budget", "predicted": None, "error": None,
            "plan": False, "front": False}  # fmt: skip
    return {"schema": 1, "resources": ["error", "file_bytes", "bitops", "joules"],
            "points": [none, *found]}  # fmt: skip


def statistics():
    """Ranges of 4 timesteps: "a" falls to a tenth, the others stay; the product's right operand
    changes more than any, and is not read."""
    low, high = np.zeros((4, 4, 2), np.float32), np.ones((4, 4, 2), np.float32)
    low[:, :3, 0] = -1
    low[:, 1, 0], high[:, 1, 0] = [-10, -5, -2, -1], [8, 4, 2, 1]
    high[:, 3, 1] = [100, 1, 1, 1]
    empty = np.zeros((4, 0))
    return Statistics(timesteps=np.array([900, 600, 300, 0], np.int32), gram=empty, row_sums=empty,
                      pooled_gram=empty, pooled_row_sums=empty, time_only=np.zeros(4, bool),
                      input_min=low, input_max=high)  # fmt: skip


def described(mode, bits=8, groups=0, without=()):
    kinds = {"c/scores": ("product", {"lhs": bits, "rhs": bits})}
    sites, a_bits = [], {}
    for path in SITES:
        kind, wanted = kinds.get(path, ("dense", bits))
        sites.append(Site(path, kind, (4, 4), 16, 16, 0, path))
        a_bits[path] = None if path in without else wanted
    stats = statistics()
    made = {name: activations.table(stats, sites, mode=name, a_bits=a_bits, groups=groups)
            for name in {mode, "static"}}  # fmt: skip
    return steps.varying(stats, sites, a_bits, mode=mode, static=made["static"], own=made[mode])


def figure(name, found):
    assert found is not None and found.name == name
    go.Figure(found.data, found.layout)  # raises on an unknown property
    return found


def data(**changes):
    """A report of two arms over four sites; `changes` are the optional parts."""
    rows = [arm("float", "float32", 32.0, 4000, "float"), arm("plan", "diffpro", 4.5, 900)]
    rows[1]["health"] = changes.pop("health", None)
    return report.ReportData(
        results={"schema": 1, "arms": rows, "protocol": {}},
        plan=plan("diffpro", 1) | {"sites": widths()}, sites=[site(path) for path in SITES],
        remainder=[], timesteps=np.array([900, 0]), importance=np.ones((2, 4)),
        score_name="manifold", matrix=None, site_paths=SITES, images={}, environment={},
        command="mpqdiff run", stages=[], **changes,
    )  # fmt: skip


def test_spectra_are_cumulative_and_k_is_on_the_curve():
    found = figure("spectra", manifold.spectra(signals()))
    lines, marks = found.data[:3], found.data[3:]
    assert [line["name"] for line in lines] == [manifold.safe(EVIL), "a", "c/scores"]  # by score
    assert lines[1]["x"] == [1, 2, 3, 4] and lines[1]["y"] == [0.4, 0.7, 0.9, 1.0]
    assert lines[0]["y"] == [0.8, 1.0] and lines[2]["y"][0] == pytest.approx(1 / 3, rel=1e-5)
    assert [(mark["x"], mark["y"]) for mark in marks] == [([2], [1.0]), ([3], [0.9]), ([3], [1.0])]
    assert marks[1]["text"] == ["k = 3 of 4, score 0.5"]


def test_the_most_sensitive_sites_alone():
    count = 9
    many = {name: np.resize(value, (count, *value.shape[1:])) for name, value in signals().items()}
    many |= {"paths": np.array([f"s{i}" for i in range(count)]), "combined": np.arange(9.0)}
    names = [trace["name"] for trace in manifold.spectra(many).data[: manifold.MOST]]
    assert names == [f"s{i}" for i in range(8, 2, -1)]


def test_energy_against_pca():
    found = figure("energy", manifold.energy(signals()))
    (trace,) = found.data
    assert (trace["x"], trace["y"]) == ([1.5, 2.5, -0.5], [1e-4, 0.5, 0.01])
    assert trace["marker"]["color"] == [0.75, 1.0, 1.0]
    small, large, _ = trace["marker"]["size"]
    assert large > small and trace["hovertext"][1] == manifold.safe(EVIL)
    assert found.layout["yaxis"]["type"] == "log"
    none = signals() | {"pca": np.array([0.0, 0.5, 0.01])}  # a site without leak
    assert manifold.energy(none).layout["yaxis"]["type"] == "linear"


def test_the_distribution_is_coloured_by_width():
    found = figure("distribution", manifold.distribution(signals(), {"sites": widths()}))
    line, *marks = found.data
    assert line["x"] == [0.1, 0.5, 0.9] and line["y"] == [1 / 3, 2 / 3, 1.0]
    assert {mark["name"]: (mark["x"], mark["hovertext"]) for mark in marks} == {
        "4 bit": ([0.5], ["a"]),
        "6 bit": ([0.1], ["c/scores"]),  # the narrower operand
        "8 bit": ([0.9], [manifold.safe(EVIL)]),
    }
    bare = widths() | {"a": {"w_bits": None, "stored_bits": [], "a_bits": None}}
    names = [trace["name"] for trace in manifold.distribution(signals(), {"sites": bare}).data[1:]]
    assert names == ["6 bit", "8 bit", "float"]


def test_the_site_whose_range_changes_most():
    found = described("step_table")
    assert found is not None and (found["path"], found["bits"]) == ("a", 8)
    np.testing.assert_array_equal(found["recorded"], [[-10, 8], [-5, 4], [-2, 2], [-1, 1]])
    step = 10 / 127  # symmetric: -128 to 127 steps of the largest magnitude
    np.testing.assert_allclose(found["static"], [[-128 * step, 10]] * 4, rtol=1e-6)
    np.testing.assert_allclose(found["own"][:, 1], [10, 5, 2, 1], rtol=1e-6)
    other = described("step_table", without=["a"])
    assert other is not None and other["path"] != "a"
    assert described("step_table", without=SITES) is None


@pytest.mark.parametrize("mode", ["step_table", "ema", "static", "online"])
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_hold_what_was_recorded(mode, bits):
    found = described(mode, bits)
    assert found is not None
    for name in ("static", "own"):
        if found[name] is None:
            assert (mode, name) == ("online", "own")
            continue
        low, high = np.moveaxis(found[name] - found["recorded"], -1, 0)
        assert np.all(low <= 1e-5) and np.all(high >= -1e-5)


def test_groups_of_steps_share_a_scale():
    found = described("step_table", groups=2)
    assert found is not None
    np.testing.assert_allclose(found["own"][:, 1], [10, 10, 10, 1], rtol=1e-6)  # rows of 600 and 0


def test_a_zero_point_shifts_what_can_be_represented():
    """Softmax-like: from 0 to 1 in 255 steps, read at both ends."""
    found = described("step_table", without=["a", "patch_embed", EVIL])
    assert found is not None and found["path"] == "c/scores"
    np.testing.assert_allclose(found["static"], [[0, 1]] * 4, atol=1e-6)


def test_ranges_with_and_without_daq():
    found = figure("ranges", steps.ranges(described("step_table")))
    low, high, *scales = found.data
    assert low["x"] == ["900", "600", "300", "0"] and low["y"] == [-10, -5, -2, -1]
    assert high["y"] == [8, 4, 2, 1] and high["fill"] == "tonexty"
    assert [trace["y"][0] > 0 for trace in scales] == [False, True, False, True]
    np.testing.assert_allclose(scales[1]["y"], [10] * 4, rtol=1e-6)
    np.testing.assert_allclose(scales[3]["y"], [10, 5, 2, 1], rtol=1e-6)
    assert "step_table" in scales[3]["name"] and "static" in scales[1]["name"]
    # (18 + 9 + 4 + 2) / 4 of 255 steps of 10 / 127, and (18 / 20 + 9 / 10 + 1 + 1) / 4 of 255 / 254
    assert "take 41 %" in found.caption and "95 % of that" in found.caption
    for mode, word in (("static", "which is what the plan runs"), ("online", "as they come")):
        single = figure("ranges", steps.ranges(described(mode)))
        assert len(single.data) == 4 and word in single.caption


def test_joint_points():
    found = figure("joint", steps.joint(points()))
    beaten, front, chosen = found.data
    assert (beaten["x"], front["x"], chosen["x"]) == ([50], [10], [20])
    assert chosen["name"] == "the plan, on the front" and chosen["y"] == [0.01]
    assert chosen["error_y"]["array"] == [pytest.approx(0.005)]
    assert chosen["error_y"]["arrayminus"] == [pytest.approx(0.0025)]
    assert chosen["text"] == ["123,456 file bytes, 40 G BitOPs, 4.50 mean bits"]
    assert "at 500 steps" in found.caption and found.layout["yaxis"]["type"] == "log"
    other = points()
    other["points"][2]["front"] = False
    assert figure("joint", steps.joint(other)).data[-1]["name"] == "the plan"
    none = points() | {"points": points()["points"][:1]}
    assert steps.joint(none) is None


def test_nothing_is_shown_where_nothing_was_recorded():
    assert manifold.drawn(None, {}) == [] and steps.ranges(None) is None
    assert steps.joint(None) is None
    page = Page(report.render(data()))
    assert not {*DRAWN, "number-of-steps", "health", "table-health"} & page.ids
    assert "bits" in page.ids


def test_health_is_a_table_of_the_arms_that_have_it():
    text = report.render(data(health=HEALTH))
    page = Page(text)
    found = {key: value for name, key, value in page.numbers if key.startswith("health")}
    assert {name for name, key, _ in page.numbers if key.startswith("health")} == {"plan"}
    assert {key: json.loads(value) for key, value in found.items()} == {
        "health.clip_rate.mean": 0.0123, "health.clip_rate.max": 0.25,
        "health.clip_rate.site": EVIL, "health.not_finite": 0, "health.images": 4}  # fmt: skip
    assert page.text["plan", "health.clip_rate.max", "0.25"] == "25.000%"
    assert "warning" not in text.split('id="arms"')[1].split('id="trade"')[0]


def test_values_that_are_not_finite_are_a_warning():
    text = report.render(data(health=HEALTH | {"not_finite": 7}))
    shown = text.split('id="arms"')[1].split('id="trade"')[0]
    assert "plan: 7 activations were not finite" in shown
    assert '<span class="tag not-finite">not finite</span>' in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"signals": signals() | {"paths": np.array(["a", "b", "ghost"])}}, "ghost"),
        ({"signals": signals() | {"energy": np.zeros(2)}}, "of 3 sites with shapes .*energy"),
        ({"signals": signals() | {"spectrum": np.ones((2, 4))}}, "spectrum"),
        ({"joint": points() | {"schema": 2}}, "schema 2"),
        ({"joint": {"schema": 1, "points": [{"steps": 3}]}}, "lack .*'error'"),
    ],
)
def test_unusable_input(changes, message):
    with pytest.raises(InputError, match=message):
        report.render(data(**changes))


def test_browser_draws_every_figure(tmp_path):
    path = tmp_path / "report.html"
    report.write(path, data(health=HEALTH, signals=signals(), ranges=described("step_table"),
                            joint=points()))  # fmt: skip
    document, page = in_browser(path, tmp_path)
    for name in DRAWN:
        assert "main-svg" in drawing(document, name), name
    assert drawing(document, "energy").count('class="point"') == 3
    assert "with DAQ: step_table" in drawing(document, "ranges")
    assert "blocks/&lt;b&gt;&amp;&lt;/script&gt;" in drawing(document, "spectra")
    assert not [r for r in page.references if not r.startswith(("#", "data:"))]


class Pair(nn.Module):
    """A site of more rows than features, and one of fewer."""

    @nn.compact
    def __call__(self, x_t, t, label):
        narrow = nn.Dense(2, name="narrow")(x_t.reshape(len(x_t), 8, 2))
        wide = nn.Dense(16, name="wide")(x_t.reshape(len(x_t), 16))
        return Prediction((narrow.reshape(wide.shape) + wide + 0.01 * t).reshape(x_t.shape))


def test_the_spectrum_that_is_recorded_is_of_the_inputs():
    """Against the covariance of all rows; 6 rows have variance in 5 of 16 directions."""
    rng = np.random.default_rng(0)
    x_ts = rng.normal(size=(3, 2, 4, 4, 1)).astype(np.float32)
    choices, denoise = ((4, 8), (8, 8)), from_linen(Pair())
    params = Pair().init(jax.random.key(0), x_ts[0], jnp.int32(0), jnp.zeros(2, jnp.int32))
    params = params["params"]
    found, _ = site_list.list_sites(denoise, params, *site_list.example_inputs((4, 4, 1)))
    ends = np.full((3, 2, 2), np.abs(x_ts).max())
    times = np.array([9, 5, 0], np.int32)
    stats = Statistics(times, *[np.zeros(0)] * 5, input_min=-ends, input_max=ends)
    a_bits = {site.path: 8 for site in found}
    table = activations.table(stats, found, mode="static", a_bits=a_bits)
    net = simulate.supernet(params, found, choices, {8: table}, [False] * 2, clip="absmax")
    recorded = manifold_record.record(denoise, net, found, choices, np.ones((2, 2), bool), x_ts,
                                      times, np.zeros(2, np.int32))  # fmt: skip
    spectra = manifold_record.spectra(recorded["spectrum"], recorded["features"])
    assert [site.path for site in found] == ["narrow", "wide"] and spectra.shape == (2, 16)
    for values, size in zip(spectra, (2, 16), strict=True):
        rows = x_ts.reshape(-1, size).astype(np.float64)
        expected = np.linalg.eigvalsh(np.cov(rows.T, bias=True))[::-1]
        np.testing.assert_allclose(values[:size], expected, rtol=1e-4, atol=1e-6)
        assert np.all(values[size:] == 0)
    assert np.all(spectra[1][5:] == 0)
    shares = manifold.cumulative(spectra[1])
    assert shares[recorded["k"][1] - 1] >= 0.95 > shares[recorded["k"][1] - 2]

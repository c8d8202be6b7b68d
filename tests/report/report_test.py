"""The report: what is in the file, what is not, and what a browser makes of it."""

import html
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import plotly.graph_objects as go
import pytest

from mpqdiff import report
from mpqdiff.costs.bytes import device_bytes
from mpqdiff.errors import InputError
from mpqdiff.evaluate.efficiency import bitops_text
from mpqdiff.quantize import pack
from mpqdiff.report import columns, numbers, tables, verdicts
from mpqdiff.report.front import pareto
from mpqdiff.sites import Site

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
EVIL = "random </script x> <script>alert(1)</script> </style <!-- & co"
BLOCKS = [f"blocks_{i}/{part}" for i in range(3) for part in ("adaln", "qkv", "scores", "mlp_in")]
PATHS = ["patch_embed", *BLOCKS, "pooler", "final/linear"]  # 15 sites


def arm(name, system, bits, nbytes, execution="integer", /, **values):
    """An arm with every key of the contract, null where not given."""
    keys = (
        "ms_per_image speedup speedup_same_steps peak_bytes resident_bytes energy_j fid fid_ci "
        "delta_fid damage kid kid_ci sfid is precision recall psnr psnr_ci ssim x0_mse"
    )
    return {
        "arm": name, "system": system, "avg_w_bits": bits, "bytes": nbytes,
        "file_bytes": nbytes - 5011, "compression": 4312016 / (nbytes - 5011),
        "bitops": 1.234567e9 * bits, "steps": 20, "execution": execution, "backend": "kernels",
        "n_images": 256, "seed": 0, **dict.fromkeys(keys.split()), **values,
    }  # fmt: skip


TERMS = {"weights": 4.5e9, "attention": 2.5e9, "zero_points": 0.5e9, "float": 2.5e9,
         "total": 1e10, "executed": 1.75e10}  # fmt: skip


def arms():
    speed = {"iqr": 0.8123456789, "n": 9, "batch": 64}
    return [
        arm("float32", "float32", 32.0, 4317027, "float", backend="xla", speedup=1.0,
            speedup_same_steps=1.0, fid=9.87654321, fid_ci=[9.5, 10.2], kid=0.0123456789,
            kid_ci=[0.0101, 0.0141], damage=0.0123, sfid=11.25,
            ms_per_image={"median": 31.4159265358979, **speed}),
        arm("mpq_diff", "mpq_diff", 4.66, 701234, psnr=25.617283945, psnr_ci=[25.4, 25.8],
            x0_mse=0.00123456789012345, x0_mse_ci=[0.0011, 0.0014], ssim=0.912345,
            fid=10.0123, fid_ci=[9.7, 10.4], kid=0.0131, kid_ci=[0.0110, 0.0150],
            damage=0.0234567, delta_fid=0.13578,
            speedup=1.31415, speedup_same_steps=1.31415, resident_bytes=812345,
            perceptual=0.0521, perceptual_ci=[0.05, 0.055], drift=0.116, drift_ci=[0.1, 0.13],
            drift_curve={"timesteps": [950, 500, 0], "mean": [0.0, 0.1, 0.25],
                         "low": [0.0, 0.08, 0.22], "high": [0.0, 0.12, 0.28]},
            bitops_terms=TERMS, downstream_accuracy=0.8125, downstream_delta=-0.0123,
            downstream_delta_ci=[-0.02, -0.001], class_agreement=0.9375,
            ms_per_image={"median": 23.90123, **speed}),
        arm("uniform", "uniform", 4.64, 700111, psnr=25.3, psnr_ci=[25.1, 25.5], x0_mse=0.0013,
            ssim=0.9, fid=12.0, fid_ci=[11.5, 12.4], kid=0.02, kid_ci=[0.018, 0.022],
            damage=0.08, delta_fid=2.1, speedup=1.3, speedup_same_steps=1.3,
            peak_bytes=9123456, resident_bytes=811222, energy_j=0.0123, sfid=14.5, precision=0.71,
            recall=0.62, **{"is": 8.25},
            ms_per_image={"median": 24.01, **speed}),
        arm(EVIL, "random", 4.65, 700888, "simulated", psnr=23.1, psnr_ci=[22.8, 23.3],
            x0_mse=0.0021, fid=13.1, fid_ci=[12.4, 13.9], kid=0.031, kid_ci=[0.028, 0.034],
            speedup=1.02),
        arm("size_only", "size_only", 4.61, 699000, psnr=math.inf, x0_mse=math.nan),
    ]  # fmt: skip


def bits(seed):
    """plan.json's sites: weights at 4 or 8, products by operand, one site left in float."""
    rng = np.random.default_rng(seed)
    sites = {}
    for path in PATHS:
        w_bits = int(rng.choice([4, 8])) if "embed" not in path and "final" not in path else 8
        sites[path] = {"w_bits": w_bits, "stored_bits": [w_bits], "a_bits": 8}
        if "scores" in path:
            sites[path] = {"w_bits": None, "stored_bits": [], "a_bits": {"lhs": 8, "rhs": 8}}
    sites["pooler"] = {"w_bits": None, "stored_bits": [], "a_bits": None}
    return sites


def plan(system, seed):
    return {
        "schema": 1, "model": {"name": "fashion_dit", "hash": "3f2a"}, "sites": bits(seed),
        "activations": {"mode": "step_table", "groups": [[950, 500], [450, 0]]},
        "timesteps": list(range(950, -1, -50)), "tokens": {}, "base_method": "nearest",
        "budgets": {"device_bytes": 701500}, "predicted": {"damage": 0.0191}, "objective": 1.25,
        "bound": 1.21, "gap": 0.04, "system": system, "provenance": {"seed": 0},
    }  # fmt: skip


def front(resources=("bytes", "seconds")):
    """pareto.json: eight budgets of bytes under one of seconds; the first fits no plan."""
    points = []
    for i in range(8):
        spent = {"bytes": 599000.0 + 30000 * i, "seconds": 0.021 + 0.0007 * i}
        budgets = {"bytes": 600000.0 + 30000 * i, "seconds": 0.03}
        found = {"predicted": {name: spent[name] for name in resources}, "objective": 3 / (i + 1),
                 "bound": 2.8 / (i + 1), "gap": 0.2 / (i + 1), "status": "rounded",
                 "average_bits": 3.0 + i / 2,
                 "sites": {path: [4, 8] for path in PATHS}}  # fmt: skip
        if i == 0:
            found = {**dict.fromkeys(found), "status": "infeasible", "sites": {}}
        if i == 7:
            found |= {"status": "optimal", "gap": 0.0, "bound": found["objective"]}
        points.append({"budgets": {name: budgets[name] for name in resources}, **found})
    return {"schema": 1, "resources": list(resources), "points": points}


def explained():
    """Rows of `mpqdiff.explain.explain`; the first at the narrowest, the last kept in float."""

    def step(w_bits, damage, priced):
        return {"w_bits": w_bits, "a_bits": 8, "damage": damage, "cost": {"bytes": 1e9 * priced},
                "priced": priced}  # fmt: skip

    rows = []
    for i, path in enumerate(PATHS):
        rows.append({
            "path": path, "w_bits": 4, "a_bits": 8, "mean_bits": 4.0, "tied": [], "best": [4, 8],
            "wider": step(8, -0.001 * (i + 1), 0.02), "narrower": step(2, 0.5, -0.01),
            "price": {"bytes": 1.25e-9}, "reduced_cost": 0.0, "verdict": f"4 bit, reason {i}",
        })  # fmt: skip
    rows[0] |= {"w_bits": 2, "narrower": None, "verdict": EVIL}
    rows[-1] |= {"w_bits": 32, "a_bits": 32, "wider": None, "reduced_cost": 1e-4}
    return rows


def site(path):
    product, first = "scores" in path, path in ("patch_embed", "final/linear")
    return {
        "path": path, "kind": "product" if product else "dense",
        "shape": [196, 196] if product else [96, 288], "parameters": 0 if product else 27648,
        "macs": 1354752, "pinned": first, "time_only": "adaln" in path,
        "reason": "excluded by config.sites.skip" if path == "pooler" else None,
        "bias": 0 if product else 288, "asymmetric": "mlp" in path,
    }  # fmt: skip


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    level, drift = rng.uniform(0.1, 0.5, len(PATHS)), np.linspace(0.0, 0.4, 20)
    matrix = np.exp(-np.abs(np.subtract.outer(np.arange(15), np.arange(15))) / 3.0)
    importance = level[None] + drift[:, None] * rng.uniform(0.5, 1.0, (20, 15))
    importance[3, 4] = np.nan
    pictures = rng.integers(0, 255, (8, 28, 28, 1), dtype=np.uint8)
    return report.ReportData(
        results={"schema": 1, "arms": arms(), "protocol": {
            "feature_space": "toy <net>", "is_fid": False,
            "fid": "64 features of fashion_classifier, 256 images against 10000 of the test set",
            "psnr": "256 images, same seeds as float32"}},
        plan=plan("mpq_diff", 1), sites=[site(path) for path in PATHS],
        remainder=[{"name": "einsum blocks_0/pool", "macs": 12544}],
        timesteps=np.arange(950, -1, -50),
        importance=importance, score_name="orthogonality", matrix=matrix, site_paths=PATHS,
        images={a["arm"]: np.roll(pictures, i, 1) for i, a in enumerate(arms()[:4])},
        environment={"python": "3.11.9", "jax": "0.10.2", "device": "cpu, 2 cores", "gpu": None},
        command="mpqdiff run --config=configs/quickstart.py --workdir=runs/quickstart",
        stages=[{"name": "record", "seconds": 31.25, "cached": False},
                {"name": "solve", "seconds": 0.5, "cached": True}],
        pareto=front(), explain=explained(),
        plans={"uniform": plan("uniform", 2), EVIL: plan("random", 3)},
    )  # fmt: skip


class Page(HTMLParser):
    """Collects what the tests look at."""

    def __init__(self, text):
        super().__init__()
        self.references, self.numbers, self.scripts, self.text, self.ids = [], [], [], {}, set()
        self.styles, self.counts, self._inside, self._number = "", {}, None, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.counts[tag] = self.counts.get(tag, 0) + 1
        links = ("src", "href", "srcset", "xlink:href", "action")
        self.references += [attrs[k] or "" for k in links if k in attrs]
        self.ids.add(attrs.get("id"))
        self._number = None
        if "data-value" in attrs:
            self._number = (attrs["data-arm"], attrs["data-key"], attrs["data-value"])
            self.numbers.append(self._number)
        self._inside = (tag, attrs.get("id"))
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = self._number = None

    def handle_data(self, data):
        if self._inside and self._inside[0] == "script":
            self.scripts[-1] += data
        elif self._inside and self._inside[0] == "style":
            self.styles += data
        if self._inside and self._inside[1]:
            self.text[self._inside[1]] = self.text.get(self._inside[1], "") + data
        if self._number:
            self.text[self._number] = data.strip()


@pytest.fixture(scope="module")
def path(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    report.write(path, data)
    return path


@pytest.fixture(scope="module")
def page(path):
    return Page(path.read_text("utf-8"))


def at(value, key):
    """The value at a dotted key of results.json, indices included."""
    for part in key.split("."):
        if value is None:
            return None
        value = value[int(part)] if isinstance(value, list) else value.get(part)
    return value


def check_numbers(page):
    """Every number of the page equals that of the embedded results, and none is left out.

    (`drift_curve` is drawn, not written.)
    """
    results = json.loads(page.text["results"])
    by_name = {a["arm"]: a for a in results["arms"]}
    for name, key, value in page.numbers:
        assert json.loads(value) == at(by_name[name], key), (name, key)
    shown = {(name, key.removesuffix(".0").removesuffix(".1")) for name, key, _ in page.numbers}
    for name, values in by_name.items():
        for key, value in values.items():
            keys = [f"{key}.{k}" for k in value] if isinstance(value, dict) else [key]
            if key != "drift_curve" and any(
                isinstance(at(values, k), int | float | list) for k in keys
            ):
                assert {(name, k) for k in keys} <= shown
    return results


def test_numbers_are_those_of_the_results(page, data):
    results = check_numbers(page)
    assert results["protocol"] == data.results["protocol"]
    assert results["arms"][:4] == data.results["arms"][:4]  # full precision
    assert results["arms"][4]["psnr"] is None and results["arms"][4]["x0_mse"] is None


def test_nothing_points_outside(page):
    outside = [r for r in page.references if not r.startswith(("#", "data:image/png;base64,"))]
    assert page.references and not outside
    assert "url(" not in page.styles and "@import" not in page.styles
    own = "".join(script for script in page.scripts if len(script) < 1_000_000)
    assert not re.search(r"https?://", own)


def test_plotly_is_there_once(page):
    assert sum("plotly.js v" in script for script in page.scripts) == 1


def test_all_sections_and_arms(page, data):
    names = {name for name, _, _ in page.numbers}
    assert names == {a["arm"] for a in data.results["arms"]}
    assert {"quality", "pareto", "bits", "importance", "orthogonality", "menu-quality",
            "menu-pareto", "menu-bits", "table-why", "table-quality", "table-speed", "drift",
            "table-bitops", "table-further", "table-sites", "table-left",
            "table-stages", "table-environment", "command"} <= page.ids  # fmt: skip
    assert page.counts["img"] == len(data.images)


def test_nulls_are_dashes(page):
    nulls = [n for n in page.numbers if n[2] == "null"]
    assert ("float32", "psnr", "null") in nulls and ("size_only", "fid", "null") in nulls
    assert {page.text[n] for n in nulls} == {numbers.DASH}


def test_names_are_escaped(path, page):
    text = path.read_text("utf-8")
    assert "<script>alert" not in text and "</script x" not in text
    assert "random &lt;/script x&gt; &lt;script&gt;alert" in text
    assert any(name == EVIL for name, _, _ in page.numbers)


def test_nothing_but_json_in_the_data(page):
    def refuse(word):
        raise AssertionError(f"{word} in JSON")

    blocks = [s for s in page.scripts if s.startswith("{")]
    assert len(blocks) == 7  # results and six figures
    for block in blocks:
        json.loads(block, parse_constant=refuse)


def test_what_was_lost_is_said(path):
    text = path.read_text("utf-8")
    assert "arms[4].psnr = inf" in text and "arms[4].x0_mse = nan" in text


def test_figures_are_valid_plotly(data):
    results = numbers.finite(data.results)
    found = report.drawn(data, results, results["arms"][1], data.plan, data.plans)
    names = ["quality", "drift", "bits", "importance", "orthogonality", "pareto"]
    assert [f.name for f in found] == names
    for figure in found:
        go.Figure(figure.data, figure.layout)  # raises on an unknown property
        assert all(len(c.visible) == len(figure.data) for c in figure.choices)
    quality, curves, bars, heat = found[:4]
    assert [choice.label for choice in quality.choices] == [
        "Paired x0 MSE, lower is better", "Paired PSNR, dB, higher is better",
        "KID, lower is better", "FID (toy <net> features), lower is better"]  # fmt: skip
    assert [trace["name"] for trace in curves.data] == ["mpq_diff"]
    assert curves.data[0]["y"] == [0.0, 0.1, 0.25]
    assert curves.data[0]["error_y"]["array"] == pytest.approx([0.0, 0.02, 0.03])
    drawn = {t["name"]: t for t, show in zip(quality.data, quality.choices[0].visible, strict=True)
             if show}  # fmt: skip
    assert set(drawn) == {"mpq_diff", "uniform", html.escape(EVIL, quote=False)}
    assert drawn["mpq_diff"]["error_y"]["array"] == [pytest.approx(0.0014 - 0.00123456789012345)]
    widths = dict(zip(bars.data[0]["y"], bars.data[0]["x"], strict=True))
    assert widths["patch_embed"] == 8 and widths["pooler"] is None
    assert heat.data[0]["z"][4][3] is None and heat.data[0]["z"][2][7] == pytest.approx(
        data.importance[7, 2], rel=1e-3
    )


def drawn_in(figure, index):
    """The traces that choice `index` of a figure's menu shows."""
    pairs = zip(figure.data, figure.choices[index].visible, strict=True)
    return [trace for trace, show in pairs if show]


def drawn_front(*args):
    figure = pareto(*args)
    assert figure is not None
    return figure


def test_the_front_and_the_arms_on_one_axis():
    rows = numbers.finite(arms())
    figure = drawn_front(front(), rows, rows[1])
    go.Figure(figure.data, figure.layout)
    bound, dots, *measured = drawn_in(figure, 0)
    assert bound["x"] == [600000.0 + 30000 * i for i in range(1, 8)]  # at the budgets
    assert dots["x"] == [599000.0 + 30000 * i for i in range(1, 8)]  # at what is spent
    assert dots["y"] == [3 / (i + 1) for i in range(1, 8)] and min(dots["y"]) == bound["y"][-1]
    assert dots["marker"]["symbol"] == ["circle-open"] * 6 + ["circle"]
    assert {m["name"]: (m["x"], m["y"], m["yaxis"]) for m in measured} == {
        "mpq_diff": ([701234], [0.00123456789012345], "y2"),
        "uniform": ([700111], [0.0013], "y2"),
        html.escape(EVIL, quote=False): ([700888], [0.0021], "y2"),
    }
    assert figure.layout["xaxis"]["title"]["text"] == "device bytes"
    assert figure.layout["shapes"][0]["x0"] == 701234 and figure.layout["yaxis"]["type"] == "linear"
    # Seconds are not swept: no bound; the arms' milliseconds become seconds.
    dots, *measured = drawn_in(figure, 1)
    assert dots["name"] == "plans" and dots["x"][0] == pytest.approx(0.0217)
    assert [m["x"] for m in measured] == [[pytest.approx(0.02390123)], [pytest.approx(0.02401)]]
    assert "1 of 8 budgets fit no plan" in figure.caption


def test_a_front_without_arms_or_plans():
    rows = numbers.finite(arms())
    figure = drawn_front(front(["bytes"]), rows[:1], rows[1])
    assert not figure.menu and figure.layout["yaxis2"]["visible"] is False
    assert figure.layout["yaxis"]["domain"] == [0.0, 1.0] and "Below" not in figure.caption
    none = front()
    none["points"] = none["points"][:1]
    assert pareto(none, rows, rows[1]) is None
    steep = front()
    steep["points"][7] |= {"objective": 1e-3, "bound": 1e-3}
    assert drawn_front(steep, rows, rows[1]).layout["yaxis"]["type"] == "log"


def test_reasons_have_the_sign_of_their_column():
    first, second, *_, last = tables.reasons(explained())
    assert [first[key].text for key in ("bits", "wider", "saves", "costs")] == [
        "2 x 8", "8 x 8", "0.001", "0.02"]  # fmt: skip
    assert first["narrower"].text == first["adds"].text == first["frees"].text == numbers.DASH
    assert (second["adds"].text, second["frees"].text) == ("0.5", "0.01")
    assert last["bits"].text == "float" and last["reduced"].text == "0.0001"
    assert tables.prices(explained()) == "Prices, in damage: 1.25e-09 per unit of bytes."
    bare = [row | {"price": None, "reduced_cost": None} for row in explained()]
    assert "no prices" in tables.prices(bare)


@pytest.mark.parametrize("results", [None, {"schema": 1, "arms": arms()}])
def test_a_front_on_its_own(tmp_path, results):
    path = tmp_path / "pareto.html"
    report.write_pareto(path, front(), results)
    page = Page(path.read_text("utf-8"))
    assert json.loads(page.text["pareto-data"]) == front()
    assert {"pareto", "table-points", "errors"} <= page.ids and page.counts["tr"] == 9
    assert not [r for r in page.references if not r.startswith(("#", "data:"))]
    assert ("measured, on" in path.read_text("utf-8")) == (results is not None)
    if results is None:  # the panels of both are drawn in the report
        document, _ = in_browser(path, tmp_path)
        assert "main-svg" in drawing(document, "pareto")
        assert "measured x0 MSE" not in drawing(document, "pareto")


def test_a_front_that_fits_nothing_is_refused(tmp_path):
    none = front()
    none["points"] = none["points"][:1]
    with pytest.raises(InputError, match="none of the 1 budgets"):
        report.write_pareto(tmp_path / "p.html", none)
    assert not list(tmp_path.iterdir())


def column(key, results):
    """The column of `key` as the report of `results` has it."""
    found = (*columns.quality(results), *columns.present(columns.FURTHER, results))
    return next(c for c in found if c.key == key)


def test_the_interval_of_the_difference_decides_ties():
    """PSNR 25.617 +- 0.2 and 25.3 +- 0.2: they overlap, the difference is outside 0.283."""
    rows = numbers.finite(arms())
    psnr, kid, damage = (column(key, {"arms": rows}) for key in ("psnr", "kid", "damage"))
    assert verdicts.ties(rows, psnr) == [(), ("best",), (), (), ()]
    assert verdicts.ties(rows, kid) == [(), ("best", "tie with float"), (), (), ()]
    assert verdicts.ties(rows, damage) == [()] * 5  # what follows from FID has FID's
    rows[2] |= {"psnr": 25.35, "psnr_ci": [25.15, 25.55]}
    assert verdicts.ties(rows, psnr)[2] == ("tie with best",)
    rows[2]["n_images"] = 300  # not compared with arms of 256
    assert verdicts.ties(rows, psnr)[2] == ()


def test_what_the_evaluation_paired_comes_before_the_intervals():
    rows = numbers.finite(arms())
    psnr, kid = (column(key, {"arms": rows}) for key in ("psnr", "kid"))
    rows[2]["against"] = {"psnr": {"mpq_diff": "tie"}}
    rows[1]["against"] = {"psnr": {"uniform": "tie"}, "kid": {"float32": "worse"}}
    assert verdicts.ties(rows, psnr)[1:3] == [("best",), ("tie with best",)]
    assert verdicts.ties(rows, kid)[1] == ("best",)  # the intervals alone say a tie with float
    assert verdicts.rival(rows, rows[1]) == (rows[2], "tie")


def test_verdict_on_the_best_rival():
    rows = numbers.finite(arms())
    assert verdicts.rival(rows, rows[1]) == (rows[2], "better")
    rows[2]["psnr_ci"] = [24.9, 25.7]
    assert verdicts.rival(rows, rows[1]) == (rows[2], "tie")
    rows[2] |= {"psnr": 26.0, "psnr_ci": [25.9, 26.1]}
    assert verdicts.rival(rows, rows[1]) == (rows[2], "worse")
    rows[2]["psnr_ci"] = None  # nothing is claimed without intervals
    assert verdicts.rival(rows, rows[1]) is None
    rows[2]["bytes"] = rows[1]["bytes"] + 1
    assert verdicts.rival(rows, rows[1]) == (rows[3], "better")


@pytest.mark.parametrize(
    ("n", "order"),
    [
        (256, ["x0_mse", "psnr", "kid", "fid", "delta_fid", "damage"]),
        (5000, ["x0_mse", "psnr", "kid", "fid", "delta_fid", "damage"]),
    ],
)
def test_paired_error_and_kid_lead(n, order):
    rows = [row | {"n_images": n} for row in numbers.finite(arms())]
    shown = [c.key for c in columns.quality({"arms": rows})]
    assert [key for key in shown if key in order] == order
    further = [c.key for c in columns.present(columns.FURTHER, {"arms": rows})]
    assert further[:3] == ["ssim", "perceptual", "drift"]
    assert (further.index("sfid") > further.index("precision")) is (n < 2000)
    own = {"leading": ["kid", "psnr", "x0_mse", "fid", "damage", "delta_fid"]}
    shown = [c.key for c in columns.quality({"arms": rows, "protocol": own})]
    assert [key for key in shown if key in order] == own["leading"]


def test_columns_that_no_arm_has_are_left_out(page):
    shown = {key for _, key, _ in page.numbers}
    assert {"perceptual", "drift", "downstream_delta", "downstream_delta_ci.0"} <= shown
    assert not {"clip_score", "against_plan.x0_mse"} & shown


def test_fid_without_a_qualifier_is_for_the_public_weights_alone(data):
    """Every FID of the page's words names the features, but for the scripts."""

    def words(is_fid):
        described = data.results["protocol"] | {"is_fid": is_fid}
        text = report.render(replace(data, results=data.results | {"protocol": described}))
        return re.sub(r"(?s)<(script|style).*?</\1>", "", text)

    plain = html.unescape(words(False))
    assert plain.count("FID (toy <net> features)") > 5
    assert not re.findall(r"\bs?FID\b(?! \(toy <net> features\))", plain)
    assert '<th scope="col" title="Frechet distance to the reference features">FID<' in words(True)


def test_what_bitops_count_is_said(page, path, data):
    text = html.unescape(path.read_text("utf-8"))
    assert all(line in text for line in bitops_text(TERMS).splitlines()[2:])
    assert "1e+10 BitOPs per image (weights 45.0%, attention 25.0%" in text
    numbers_of = {key: value for name, key, value in page.numbers if name == "mpq_diff"}
    assert json.loads(numbers_of["bitops_terms.zero_points"]) == 0.5e9


def test_indicative_below_2000_images():
    rows = numbers.finite(arms())
    rows[2]["n_images"] = 2000
    labels = [row[0].labels for row in tables.cells(rows, [column("fid", {"arms": rows})])]
    assert ["indicative" in words for words in labels] == [True, True, False, True, False]


def test_bytes_and_share_of_a_plan(data):
    rows = {row["path"]: row for row in tables.site_rows(data.sites, data.plan)}
    assert rows["patch_embed"]["bytes"] == f"{27648 + 8 * 288:,}"
    assert rows["pooler"]["bytes"] == f"{4 * (27648 + 288):,}"
    assert rows["blocks_0/scores"]["a_bits"] == "lhs 8; rhs 8" and rows["pooler"]["in_float"]
    assert tables.integer_share(data.sites, data.remainder, data.plan) == pytest.approx(
        14 * 1354752 / (15 * 1354752 + 12544)
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_bytes_of_a_site_are_those_of_the_planner(bits, asymmetric):
    known = Site("a", "dense", (3, 5, 7), 105, 7, 0, "a")
    row = {"parameters": 105, "shape": [3, 5, 7]}
    entry = {"w_bits": bits, "stored_bits": [bits]}
    whole = tables.site_bytes(row | {"bias": 7, "asymmetric": asymmetric}, entry)
    assert whole == device_bytes(known, bits, asymmetric)
    assert tables.site_bytes(row, entry) == pack.packed_bytes((15, 7), bits)
    none = device_bytes(replace(known, shape=(3, 5, 7), bias=0), bits, False)
    twice = tables.site_bytes(row | {"bias": 0}, {"w_bits": [bits, 4], "stored_bits": [bits, 4]})
    assert twice == none + device_bytes(replace(known, bias=0), 4, False)


def test_the_note_says_what_the_bytes_are(data):
    assert "packed weights, scales, bias and column sums." in report.render(data)
    bare = [{k: v for k, v in site.items() if k != "bias"} for site in data.sites]
    assert "scales and biases are counted in the arm" in report.render(replace(data, sites=bare))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"importance": np.zeros((3, 2))}, "importance has shape"),
        ({"matrix": np.zeros((2, 2))}, "matrix has shape"),
        ({"results": {"schema": 2, "arms": arms()}}, "schema 2"),
        ({"results": {"schema": 1, "arms": []}}, "0 arms"),
        ({"arm": "nobody"}, "nobody"),
        ({"images": {"float32": np.zeros((2, 8, 8, 2), np.uint8)}}, "C 1 or 3"),
        ({"plans": {"ghost": plan("ghost", 0)}}, "ghost"),
        (
            {"pareto": {"schema": 1, "resources": ["bytes"], "points": [{"budgets": {}}]}},
            "points lack .*'objective'",
        ),
        ({"pareto": front() | {"schema": 3}}, "front of schema 3"),
    ],
)
def test_unusable_input_leaves_the_old_file(data, tmp_path, changes, message):
    path = tmp_path / "report.html"
    path.write_text("before")
    with pytest.raises(InputError, match=message):
        report.write(path, replace(data, **changes))
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_path_that_cannot_be_written(data, tmp_path):
    with pytest.raises(InputError, match="cannot write the report"):
        report.write(tmp_path / "absent" / "report.html", data)


def test_smoke_results_without_metrics(data, tmp_path):
    bare = [arm("float32", "float32", 32.0, 4317027, "float"), arm("p", "mpq_diff", 4.6, 700000)]
    report.write(tmp_path / "r.html", replace(
        data, results={"schema": 1, "protocol": {}, "arms": bare}, matrix=None, pareto=None,
        explain=None, plans={}, images={}, remainder=[]))  # fmt: skip
    page = Page((tmp_path / "r.html").read_text("utf-8"))
    check_numbers(page)
    assert (
        "bits" in page.ids
        and not {"quality", "orthogonality", "menu-bits", "pareto", "front", "why", "table-why"}
        & page.ids
    )


def test_simulated_arms_claim_no_speed(data):
    rows = tables.cells(numbers.finite(arms()), columns.SPEED)
    at = next(i for i, column in enumerate(columns.SPEED) if column.key == "speedup")
    assert [row[at].labels for row in rows] == [(), (), (), ("simulated: no claim",), ()]


def in_browser(path, tmp_path):
    """The document of `path` after its scripts have run in headless Chromium, and its parse."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is on PATH")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True)  # fmt: skip
    page = Page(done.stdout)
    assert "errors" in page.ids and page.text.get("errors", "") == ""
    return done.stdout, page


def drawing(document, name):
    """The part of the document between a figure's element and its caption."""
    return document.split('<div class="plot', 1)[1].split(f'id="{name}"', 1)[1].split(
        "<figcaption>", 1)[0]  # fmt: skip


def test_browser_draws_every_figure(path, tmp_path):
    document, page = in_browser(path, tmp_path)
    for name in ("quality", "drift", "bits", "importance", "orthogonality", "pareto"):
        assert "main-svg" in drawing(document, name), name
    for name in ("importance", "orthogonality"):
        assert 'href="data:image/png' in drawing(document, name)  # the cells of the heat map
    assert drawing(document, "bits").count('class="point"') == len(PATHS)
    assert "measured x0 MSE" in drawing(document, "pareto")
    assert "Paired x0 MSE" in drawing(document, "quality")
    assert not [r for r in page.references if not r.startswith(("#", "data:"))]
    check_numbers(page)


def test_browser_menus_change_the_figures(path, tmp_path):
    choose = """<script>for (const [id, at] of [["menu-quality", 3], ["menu-bits", 1],
                                                  ["menu-pareto", 1]]) {
      const menu = document.getElementById(id); menu.value = at;
      menu.dispatchEvent(new Event("change")); }
      const saves = document.querySelectorAll("#table-why th")[3];
      saves.click(); saves.click();</script></body>"""
    changed = tmp_path / "changed.html"
    changed.write_text(path.read_text("utf-8").replace("</body>", choose), "utf-8")
    document, _ = in_browser(changed, tmp_path)
    quality = drawing(document, "quality")
    assert "FID (toy" in quality and "Paired x0 MSE" not in quality
    assert ">float32<" in quality  # the line of the float model
    assert "random &lt;/script x&gt; &lt;script&gt;alert(1)" in quality  # in the legend, as text
    assert drawing(document, "bits").count('class="point"') == 2 * len(PATHS)
    assert "seconds per image" in drawing(document, "pareto")
    assert "lower bound" not in drawing(document, "pareto")
    order = re.findall(r"<th scope=\"row\">([^<]*)", document.split('id="table-why"', 1)[1])
    # Descending by what a wider step saves; the one without such a step comes last.
    assert order[: len(PATHS)] == [*reversed(PATHS[:-1]), PATHS[-1]]


def test_an_arm_of_fewer_steps_says_both_speed_ups(tmp_path, data):
    plan = data.results["arms"][1]
    faster = {**plan, "steps": 10, "speedup": 2.75, "speedup_same_steps": 1.4}
    others = data.results["arms"]
    results = {**data.results, "arms": [others[0], faster, *others[2:]]}
    path = tmp_path / "report.html"
    report.write(path, replace(data, results=results))
    text = path.read_text("utf-8")
    assert "measured, over float32 in 20 steps; 1.40x over float32 in its own 10" in text
    assert "measured, over float32 at the same steps" not in text

"""Charts: themed, self-contained SVG with unique ids, read-outs that tell the data, sizes that stay small."""
import json
import re
import warnings
from html import unescape
from xml.etree import ElementTree

import numpy as np
import pytest

from copd_megatron.report.charts import PALETTE, Chart, Line, bucket, render, smooth
from copd_megatron.report.style import COLOURS

X = np.arange(1.0, 31.0)


def svg_of(body: str) -> str:
    return re.search(r"<svg.*</svg>", body, re.S)[0]


def readout_of(body: str) -> dict:
    return json.loads(unescape(re.search(r"data-readout='([^']*)'", body)[1]))


CHARTS = {
    "lines": Chart([Line("a", X, X / 30, "c1"), Line("b", X, 1 - X / 30, "c2", dash=True)], spans=[(5, 9)],
                   percent=True, x_range=(0.5, 30.5)),
    "one point": Chart([Line("a", X[:1], X[:1], "c1")]),
    "band": Chart([Line("a", X, X, "c3", broken=True, low=X - 1, high=X + 1)]),
    "marked": Chart([Line("a", X[:3], X[:3], "ink", low=X[:3] - 1, high=X[:3] + 1)], marked=True),
    "stacked": Chart([Line("a", X, X, "c1"), Line("b", X, X, "c2")], stacked=True),
    "log": Chart([Line("a", X, 10.0 ** (X / 10), "c1")], log=True),
    "constant": Chart([Line("a", X, np.full(30, 1e-5), "c1")]),
    "with gaps": Chart([Line("a", X, np.where(X % 3 == 0, np.nan, X), "c1")]),
    "many": Chart([Line(f"e{i}", X, X + i, faint=True) for i in range(40)] + [Line("base", X, X, "muted")]),
}


@pytest.mark.parametrize("name", CHARTS)
def test_charts_are_themed_wellformed_and_without_outside_links(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        body = render(CHARTS[name], "salt1")
    ElementTree.fromstring(svg_of(body).replace("&nbsp;", " "))
    assert "http" not in body
    assert not re.search(r"#0c00[0-9a-f]{2}", body), "a stand-in colour was left in"
    used = set(re.findall(r"var\(--([\w-]+)\)", body)) - {"k", "font"}
    assert used <= set(COLOURS) and "grid" in used
    ids, links = re.findall(r' id="([^"]*)"', body), set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    assert len(ids) == len(set(ids)) and links <= set(ids) and all(i.startswith("salt1-") for i in ids)


def test_two_charts_share_no_ids():
    first, second = (set(re.findall(r' id="([^"]*)"', render(CHARTS["lines"], salt))) for salt in ("p", "q"))
    assert first and not first & second


def test_readout_has_box_range_and_points():
    data = readout_of(render(CHARTS["lines"], "s"))
    assert data["range"] == [0.5, 30.5] and data["percent"] is True
    assert 0 < data["box"][0] < 0.2 < 0.9 < data["box"][1] <= 1
    assert data["lines"][0]["x"] == X.tolist()
    assert data["lines"][0]["y"][-1] == 1.0
    assert "NaN" not in render(CHARTS["with gaps"], "s")


def test_faint_lines_show_as_their_median():
    body = render(CHARTS["many"], "s")
    assert [line["label"] for line in readout_of(body)["lines"]] == ["base", "median of 40 in grey"]
    assert "e17" not in body
    assert readout_of(body)["lines"][1]["y"][0] == 1 + 19.5


def test_labels_are_escaped():
    body = render(Chart([Line("<b>&'\"", X, X, "c1")]), "s")
    assert "<b>" not in body
    assert readout_of(body)["lines"][0]["label"] == "<b>&'\""


def test_a_long_run_stays_small():
    steps = np.arange(1.0, 20001.0)
    noise = np.random.default_rng(0).normal(size=20000)
    body = render(Chart([Line(str(i), steps, noise, PALETTE[i]) for i in range(3)]), "s")
    assert len(body) < 80_000


def test_bucket_keeps_means_and_bounds():
    x = np.arange(1000.0)
    bx, by = bucket(x, x * 2, 100)
    assert len(bx) == 100
    np.testing.assert_allclose(by, 2 * bx)
    assert bucket(x[:5], x[:5], 100)[0] is not None and len(bucket(x[:5], x[:5], 100)[0]) == 5
    y = np.full(1000, np.nan)
    y[7] = 3.0
    assert bucket(x, y, 10)[1].tolist() == [3.0]


def test_smooth_keeps_constants_and_skips_nan():
    y = np.full(100, 2.0)
    y[50] = np.nan
    np.testing.assert_allclose(smooth(y), 2.0)
    short = np.array([1.0, 5.0])
    assert smooth(short) is short

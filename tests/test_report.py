"""What the report says follows from the rows: ratios, sums, Markdown, page data, the README."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fusednorm.bench import html, palette, report, results, views
from fusednorm.bench.providers import PROVIDERS

import synthetic_bench as made_up
from synthetic_bench import row, timed_row

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
BLOCKS = report.BLOCK.findall(README.read_text())


def ratios(rows):
    return [c.speedup for c in views.compare_rows(rows)]


def test_a_speed_up_is_the_peers_time_over_the_rows():
    rows = [timed_row(3.0), timed_row(2.0, provider="reference"), timed_row(6.0, provider="eager")]
    assert ratios(rows) == [1.0, 1.5, 0.5]
    assert [c.is_peer for c in views.compare_rows(rows)] == [True, False, False]
    # Where cuDNN has a time, it is the peer, and native is one of the others.
    rows += [timed_row(1.0, provider="cudnn")]
    assert ratios(rows) == [1 / 3, 0.5, 1 / 6, 1.0]
    rows[-1] = row(provider="cudnn", error="refused a time")
    assert ratios(rows) == [1.0, 1.5, 0.5, None]


@pytest.mark.parametrize(
    "other",
    [
        {"direction": "backward"},
        {"shape": [2, 64, 8, 9]},
        {"dtype": "float16"},
        {"layout": "nhwc"},
        {"act": "relu"},
        {"residual": True},
        {"cold": True},
        {"graph": True},
        {"run": 1},
        {"kind": "step", "op": "resnet50[batch_group_norm]"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_no_ratio_of_two_different_cases(other):
    rows = [timed_row(3.0), timed_row(2.0, provider="cuda", **other)]
    assert ratios(rows) == [1.0, None]
    assert ratios([*rows, timed_row(2.0, provider="cuda")])[2] == 1.5


def test_a_group_norm_by_the_peer_is_not_the_peer():
    rows = [timed_row(1.0, op="group_norm[32]"), timed_row(3.0)]
    assert ratios(rows) == [3.0, 1.0]


def test_steps_have_a_peer_of_their_own_even_where_one_is_not_captured():
    step = {"kind": "step", "direction": "train", "cold": None}
    rows = [
        timed_row(4.0, **step, op="resnet50[batch_norm]", graph=True),
        timed_row(2.0, **step, op="resnet50[cross_iteration]", provider="eager"),
    ]
    assert ratios(rows) == [1.0, 2.0]


@pytest.mark.parametrize(("ms", "verdict"), [(0.80, "faster"), (0.95, "even"), (1.2, "slower")])
def test_faster_and_slower_need_spreads_that_do_not_overlap(ms, verdict):
    rows = [timed_row(1.0), timed_row(ms, provider="cuda")]
    assert views.compare_rows(rows)[1].verdict == verdict


def test_tallies_are_the_sums_of_the_rows():
    rows = made_up.large()[1]
    peers = {}
    for each in rows:
        if each["provider"] == "cudnn" and each["ms_median"] is not None:
            peers[views.case_key(each)] = each["ms_median"]
    for tally in views.tallies(rows):
        mine = [r for r in rows if (r["op"], r["provider"]) == (tally.op, tally.provider)]
        beside = [r for r in mine if r["ms_median"] and views.case_key(r) in peers]
        assert tally.compared == len(beside)
        assert tally.untimed == sum(r["ms_median"] is None for r in mine)
        if not beside:
            assert (tally.op, tally.worst, tally.best) == ("renorm", None, None)
            continue
        slowest = min(beside, key=lambda r: peers[views.case_key(r)] / r["ms_median"])
        assert tally.worst == (peers[views.case_key(slowest)] / slowest["ms_median"], slowest)
        assert tally.best is not None
        assert tally.best[0] >= tally.worst[0]
    assert {tally.provider for tally in views.tallies(rows)} == {"cuda", "triton"}


def test_the_header_tells_the_hour_with_its_zone():
    assert ("Started", "2000-01-01 00:00 UTC") in views.facts(made_up.HEADER)


def test_layers_are_resnets_whatever_the_batch():
    assert views.layer(row(shape=[7, 1024, 14, 14])) == "l3.c3"
    assert views.layer(row(shape=[2, 64, 112, 112])) == "stem"
    for other in ([2, 64, 112, 56], [2, 65, 56, 56], [64, 112], [2, 64, 112]):
        assert views.layer(row(shape=other)) is None
    assert views.layer(row(kind="step", shape=[2, 64, 56, 56])) is None


def test_every_row_is_in_the_terminals_table_and_in_markdown():
    header, rows = made_up.small()
    rows.append(row(provider="eager", error=made_up.NASTY))
    table, page = report.table(rows), report.markdown(header, rows)
    for each in rows[:-1]:
        for text in (table, page):
            # A line of its own: name, provider, median and spread.
            pattern = (
                rf"{re.escape(each['op'])}[ |]+{each['provider']}[ |]+{each['ms_median']:.4g}\b"
            )
            assert re.search(pattern, text)
    assert made_up.NASTY in table
    assert 'quoted" \\| piped' in page
    assert "</script>" not in page
    # Every line of a table has as many cells as its head.
    for part in re.findall(r"(?:^\|.*\n)+", page, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in part.splitlines()}) == 1
    assert header["device"] in page
    assert header["commit"] in page
    assert "native batch norm" in table
    for text in (report.table([]), report.markdown(header, [])):
        assert "no speed-ups" in text


def test_losses_stand_beside_wins_in_markdown():
    header, rows = made_up.small()
    page = report.markdown(header, rows)
    assert re.search(r"batch_group_norm\[C\] \| reference \| 2 \| 0 \| 0 \| 2 \| 0 \| 0\.40x", page)


def test_the_picture_needs_a_time_and_says_what_it_left_out(tmp_path):
    with pytest.raises(ValueError, match="no row has a time"):
        report.plot(made_up.HEADER, [row(error="refused a time")], tmp_path / "p.png")
    rows = made_up.large()[1]
    kept, said = views.first_choice(rows)
    assert said == ["cold L2", "graph replay"]
    assert all(r["cold"] and r["graph"] for r in kept if r["kind"] == "kernel")
    assert sum(r["kind"] == "step" for r in kept) == sum(r["kind"] == "step" for r in rows)
    assert views.first_choice(made_up.small()[1])[1] == []


# --- colours -----------------------------------------------------------------------------------

OKABE_ITO = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]
# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
VISIONS = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
# sRGB's primaries to CIE XYZ under D65.
XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)


def linear(colour: str) -> Any:
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb: Any) -> Any:
    ratio = XYZ @ np.clip(rgb, 0, 1) / XYZ.sum(axis=1)
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def closest(colours: Any, vision: str) -> float:
    """The smallest CIE 1976 difference of any two, as somebody with that vision sees them."""
    seen = [lab(np.array(VISIONS[vision]) @ linear(colour)) for colour in colours]
    return min(float(np.linalg.norm(a - b)) for i, a in enumerate(seen) for b in seen[i + 1 :])


def contrast(one: str, other: str) -> float:
    a, b = sorted(float(XYZ[1] @ linear(colour)) for colour in (one, other))
    return (b + 0.05) / (a + 0.05)


STYLES = [*palette.PROVIDERS.values()]


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("ground", ["light", "dark"])
def test_colours_stay_apart_under_colour_blindness(ground, vision):
    """As far as the least of Okabe and Ito's own eight, made for the purpose, in any vision."""
    wanted = min(closest(OKABE_ITO, each) for each in VISIONS)
    assert closest({getattr(style, ground) for style in STYLES}, vision) >= wanted > 15


@pytest.mark.parametrize(
    ("ground", "under"), [*zip(("light", "dark"), palette.GROUND, strict=True)]
)
def test_marks_stand_out_from_the_ground(ground, under):
    # WCAG 2.2, 1.4.11: graphics need 3:1.
    for style in [*STYLES, palette.UNKNOWN]:
        assert contrast(getattr(style, ground), under) >= 3


def test_markers_alone_tell_every_provider_and_are_one_size():
    assert set(PROVIDERS) <= set(palette.PROVIDERS)
    paths = [palette.svg_path(style.marker) for style in [*STYLES, palette.UNKNOWN]]
    assert len(set(paths)) == len(STYLES) + 1
    for style in STYLES:
        assert 0.9 <= max(math.hypot(x, y) for x, y in style.marker) <= 1.25
    assert palette.style("somebody's") is palette.UNKNOWN


# --- the page, short of a browser ----------------------------------------------------------------


def page_data(page: str) -> dict[str, Any]:
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert len(found) == 1
    data = json.loads(found[0], parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    data["rows"] = [dict(zip(data["columns"], line, strict=True)) for line in data["rows"]]
    return data


def test_the_page_carries_every_figure_of_every_row():
    header, rows = made_up.large()
    data = page_data(html.html(header, rows))
    assert len(data["rows"]) == len(rows)
    for there, here in zip(data["rows"], rows, strict=True):
        if there["kernels"] is not None:
            there["kernels"] = data["kernels"][there["kernels"]]
        for name in there.keys() & here.keys() - {"error"}:
            value = here[name] if here[name] != math.inf else "Infinity"
            assert there[name] == ([] if (name, value) == ("shape", None) else value), name
        assert (there["error"] is None) == (here["ms_median"] is not None)
    assert [r["speedup"] for r in data["rows"]] == ratios(rows)


def test_the_page_needs_nothing_else():
    page = html.html(*made_up.large())
    for needing in (r"https?:(?!//www\.w3\.org/2000/svg)", r"\bsrc=", r"@import", r"url\("):
        assert not re.search(needing, page), needing
    assert re.findall(r"<link[^>]*>", page) == ['<link rel="icon" href="data:,">']
    assert "default-src 'none'" in page
    assert "{{" not in page.replace(made_up.NASTY[-20:], "").split("<script")[0]


def test_nothing_in_a_file_can_break_out_of_its_place():
    evil = "</script><script>alert(1)</script>{{data}}<!--"
    header = {**made_up.HEADER, "device": evil, "commit": evil}
    rows = [row(op=evil, provider=evil, error=evil), timed_row(1.0, kernels=[evil])]
    page = html.html(header, rows)
    assert page.count("</script>") == html.html(made_up.HEADER, []).count("</script>")
    assert "<script>alert" not in page
    assert page_data(page)["rows"][0]["op"] == evil


def test_old_and_empty_files_make_a_page():
    """Fields that came later may be missing, and no row at all is a page that says so."""
    old = {
        k: v for k, v in timed_row(1.0).items() if k not in ("kind", "peak_bytes", "run", "cold")
    }
    del old["error"]
    header = {"device": "x", "copy_gb_per_s": 1.0}
    (found,) = page_data(html.html(header, [old]))["rows"]
    assert (found["kind"], found["cache"]) == ("kernel", None)
    assert page_data(html.html(header, []))["rows"] == []
    assert "x, copy 1 GB/s" in report.markdown(header, [old])


def test_a_row_may_stand_for_every_case():
    """What this version lacks is one row, without a shape."""
    gone = dict.fromkeys(("direction", "shape", "dtype", "layout", "cold", "graph"))
    lacking = row(**gone, op="renorm", provider="cuda", error="not in this version: X")
    header, rows = made_up.small()
    assert views.tensor_bytes(lacking) is None
    for text in (report.table([*rows, lacking]), report.markdown(header, [*rows, lacking])):
        assert re.search("every case(.|\n)*renorm.*not in this version: X", text)
    found = page_data(html.html(header, [*rows, lacking]))
    assert (found["rows"][-1]["shape"], found["rows"][-1]["bytes"]) == ([], None)
    assert found["choices"]["batch"] == [32]
    assert found["choices"]["cache"] == ["warm"]


def test_history_has_this_run_last():
    header, rows = made_up.small()
    before = copy.deepcopy(rows)
    before[1]["ms_median"] *= 2
    runs = page_data(html.html(header, rows, [({**header, "commit": "old"}, before)]))["history"]
    assert [run["commit"] for run in runs] == ["old", "0000synthetic"]
    first, second = (run["points"][0]["speedup"] for run in runs)
    assert second == pytest.approx(2 * first)
    assert [len(run["points"]) for run in runs] == [4, 4]
    assert page_data(html.html(header, rows))["history"] == []


# --- the README ----------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path):
    """A README with an empty block and a results file below it."""
    kept = tmp_path / "bench" / "results" / "made-up" / "bench.json"
    kept.parent.mkdir(parents=True)
    header, rows = made_up.small()
    kept.write_text(json.dumps({"header": header, "rows": rows}))
    text = "before\n<!-- benchmark none -->\n<!-- /benchmark -->\nafter\n"
    (tmp_path / "README.md").write_text(text)
    return tmp_path, kept


def stamp(picture: Path) -> str:
    """The Description of a PNG's text chunk."""
    found = re.search(rb"tEXtDescription\0(\w+)", picture.read_bytes())
    assert found
    return found[1].decode()


def test_the_readme_is_filled_from_the_rows_and_names_their_origin(home):
    folder, kept = home
    readme = folder / "README.md"
    for _ in range(2):  # a second time changes nothing
        report.write_readme(readme, kept)
        text = readme.read_text()
        assert text.startswith("before\n<!-- benchmark bench/results/made-up/bench.json -->\n")
        assert text.endswith("\n<!-- /benchmark -->\nafter\n")
    header, rows = made_up.small()
    for named in (header["device"], header["commit"], "2000-01-01", "0.40x", "1.71x"):
        assert named in text
    for picture in report.PICTURES:
        assert stamp(folder / picture) == report.digest(header, rows)


def test_a_readme_is_left_alone_where_it_cannot_be_filled(home, tmp_path_factory):
    folder, kept = home
    readme = folder / "README.md"
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "bench.json"
    elsewhere.write_text(kept.read_text())
    before = readme.read_text()
    with pytest.raises(ValueError, match="lies outside"):
        report.write_readme(readme, elsewhere)
    assert readme.read_text() == before
    readme.write_text("no block")
    with pytest.raises(ValueError, match="has no <!-- benchmark"):
        report.write_readme(readme, kept)


def test_the_readmes_figures_are_current():
    """`python -m fusednorm.bench report FILE --readme README.md` would change nothing."""
    ((named, block),) = BLOCKS
    kept = [path.relative_to(ROOT).as_posix() for path in RESULTS.rglob("bench.json")]
    if kept:
        assert named in kept
        header, rows = results.load(ROOT / named)
        assert "SYNTHETIC" not in header["device"]
        assert header["commit"]
        assert block.strip() == report.readme_block(named, header, rows)
        for picture in report.PICTURES:
            assert stamp(ROOT / picture) == report.digest(header, rows)
    else:
        assert (named, block.strip()) == ("none", "No results are kept yet.")


def test_no_made_up_figure_is_published():
    for kept in RESULTS.rglob("*.json"):
        assert "synthetic" not in kept.read_text().lower(), kept
    assert "synthetic" not in README.read_text().lower()

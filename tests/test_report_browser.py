"""The report's page in a real browser: what it draws, how it reads, what it asks of the network.

Headless Chromium from the system's packages (tools/chromium.py). FUSEDNORM_NO_CHROMIUM=1 in the
environment says that the page is knowingly not tested.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from fusednorm.bench.views import compare_rows, fusion, layer, tensor_bytes

import synthetic_bench as made_up
from report_pages import (
    DESKTOP,
    FIRST,
    HEADER,
    KERNELS,
    RATIOS,
    ROWS,
    choose,
    list_all,
    listed,
    marked,
    ratio_rows,
    search,
    table,
)

pytest_plugins = ("report_fixtures",)


def test_the_header_names_the_machine(large):
    said = large.js("document.querySelector('header').innerText")
    facts = ["SYNTHETIC card", "2.13.0", "0000synthetic", "4000 GB/s", "1980 MHz", "13.0", "91000"]
    for fact in facts:
        assert fact in said
    untimed = [row for row in ROWS if row["ms_median"] is None]
    refused = sum(row["error"].startswith("refused") for row in untimed)
    counts = (len(ROWS), len(ROWS) - len(untimed), refused, len(untimed) - refused)
    expected = "{} rows: {} timed, {} refused a time by the error gate, {} without".format(*counts)
    assert expected in said


def test_each_chart_has_a_mark_for_each_of_its_rows(large):
    timed = [i for i in FIRST if KERNELS[i] and ROWS[i]["ms_median"] is not None]
    assert len(timed) > 1000
    assert marked(large, "roofline") == timed
    assert marked(large, "layers") == ratio_rows(FIRST, True)
    assert marked(large, "others") == ratio_rows(FIRST, False)
    known = [i for i in FIRST if ROWS[i]["max_err"] is not None]
    assert marked(large, "errors") == known
    steps = [i for i in FIRST if not KERNELS[i] and ROWS[i]["images_per_s"] is not None]
    assert marked(large, "steps") == steps
    # Rows without a time stand in words in their bar's place.
    words = "[...document.querySelectorAll('#steps text.bad')].map((t) => t.textContent)"
    assert large.js(words) == ["no folding for this norm"] * 4


def test_marks_lie_where_the_figures_are(large):
    """Positions against the ticks of the axes, on both logarithmic axes of every panel."""
    panels = large.js("""[...document.querySelectorAll('#roofline svg')].map((svg) => ({
        xs: [...svg.querySelectorAll('text.tick')].filter((t) => t.getAttribute('text-anchor') ===
            'middle').map((t) => [t.textContent, Number(t.getAttribute('x'))]),
        ys: [...svg.querySelectorAll('text.tick')].filter((t) => t.getAttribute('text-anchor') ===
            'end').map((t) => [t.textContent, Number(t.getAttribute('y')) - 4]),
        roofs: [...svg.querySelectorAll('.roof')].map((l) => Number(l.getAttribute('y1'))),
        marks: [...svg.querySelectorAll('.mark')].map((m) => [Number(m.dataset.row),
            ...m.getAttribute('transform').match(/translate\\((.*?)\\)/)[1].split(' ').map(Number)])
    }))""")
    assert len(panels) == 2
    units = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}

    def reader(ticks: list[tuple[float, float]]) -> Any:
        (a, x), (b, y) = ticks[0], ticks[-1]
        slope = math.log(b / a) / (y - x)
        return lambda place: a * math.exp(slope * (place - x))

    for panel in panels:
        sizes = [(float(w.split()[0]) * units[w.split()[1]], x) for w, x in panel["xs"]]
        read_x, read_y = reader(sizes), reader([(float(w), y) for w, y in panel["ys"]])
        assert read_y(panel["roofs"][0]) == pytest.approx(HEADER["copy_gb_per_s"], rel=0.01)
        for index, x, y in panel["marks"]:
            assert read_x(x) == pytest.approx(tensor_bytes(ROWS[index]), rel=0.01)
            assert read_y(y) == pytest.approx(ROWS[index]["gb_per_s"], rel=0.01)


def test_bars_end_where_the_ratios_are(large):
    marked(large, "layers")  # all charts
    charts = large.js("""[...document.querySelectorAll('#layers svg')].map((svg) => ({
        ticks: [...svg.querySelectorAll('text.tick')].map((t) => [parseFloat(t.textContent),
            Number(t.getAttribute('x'))]),
        bars: [...svg.querySelectorAll('.row')].filter((g) => g.querySelector('.mark')).map((g) => {
            const [bar, mark] = ['.bar', '.mark'].map((name) => g.querySelector(name));
            return { row: Number(mark.dataset.row), said: g.querySelector('.note').textContent,
              from: Number(bar.getAttribute('x')), long: Number(bar.getAttribute('width')),
              tip: Number(mark.getAttribute('transform').match(/\\(([-\\d.]+)/)[1]) };
        }) }))""")
    assert len(charts) == 16
    # One scale for all, or bars of two charts could not be compared.
    spans = [math.dist(*(t[1:] for t in chart["ticks"] if t[0] in (0.5, 1))) for chart in charts]
    assert max(spans) - min(spans) < 1
    for chart in charts:
        (a, x), (b, y) = chart["ticks"][0], chart["ticks"][-1]
        one = dict(map(tuple, chart["ticks"]))[1]
        for bar in chart["bars"]:
            ratio = RATIOS[bar["row"]].speedup
            read = a * (b / a) ** ((bar["tip"] - x) / (y - x))
            assert read == pytest.approx(ratio, rel=0.01)
            assert bar["said"] == f"{ratio:.2f}×"
            # Losses reach to the left of the line as far as equal wins to the right.
            assert bar["from"] == pytest.approx(min(one, bar["tip"]), abs=0.2)
            assert bar["long"] == pytest.approx(max(0.5, abs(bar["tip"] - one)), abs=0.2)


def test_the_tables_figures_are_the_rows(large):
    choose(large, cache="", launch="")
    list_all(large)
    heads = large.js("[...document.querySelectorAll('#rows thead th')].map((h) => h.innerText)")
    assert heads == [
        *["Op", "Provider", "Direction", "Shape", "Layer", "Type", "Layout", "Fusion", "Cache"],
        *["Launch", "Median, ms", "p10", "p90", "GB/s", "% of copy", "Speed-up", "Images/s"],
        *["Peak memory", "Error", "Torch's error", "Nodes", "Kernels"],
    ]
    lines = table(large)
    assert len(lines) == len(ROWS)
    for row, compared, line in zip(ROWS, RATIOS, lines, strict=True):
        size = "x".join(map(str, row["shape"] or ()))
        words = [row["op"], row["provider"], row["direction"] or "", size, layer(row) or ""]
        assert line[:8] == [*words, row["dtype"] or "", row["layout"] or "", fusion(row)]
        if row["ms_median"] is None:
            assert line[10] == row["error"]
            rest = line[11:]
        else:
            names = ("ms_median", "ms_p10", "ms_p90", "gb_per_s", "pct_copy")
            for said, name in zip(line[10:15], names, strict=True):
                assert number(said) == (
                    None if row[name] is None else pytest.approx(row[name], rel=6e-3)
                )
            assert number(line[10]) == pytest.approx(row["ms_median"], rel=6e-4)
            ratio = compared.speedup
            assert line[15] == ("" if ratio is None else f"{ratio:.2f}×")
            images = row["images_per_s"]
            assert number(line[16]) == (None if images is None else pytest.approx(images, rel=6e-4))
            assert line[17] == "" or row["peak_bytes"] == pytest.approx(
                in_bytes(line[17]), rel=6e-3
            )
            rest = line[18:]
        for said, value in zip(rest[:2], (row["max_err"], row["ref_err"]), strict=True):
            assert number(said) == (None if value is None else pytest.approx(value, rel=0.06))
        assert rest[2:] == [str(row["nodes"] or ""), str(len(row["kernels"] or "") or "")]


def number(said: str) -> float | None:
    return None if said == "" else math.inf if said == "∞" else float(said)


def in_bytes(said: str) -> float:
    value, unit = said.split()
    return float(value) * {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


def test_filters_reach_every_chart_and_the_table(large):
    choose(large, dtype="float16", cache="", launch="")
    assert large.js("document.getElementById('shown').value") == f"4 of {len(ROWS)} rows shown"
    wanted = [i for i, row in enumerate(ROWS) if row["dtype"] == "float16"]
    assert ROWS[-1]["shape"] is None
    assert listed(large) == [*wanted, len(ROWS) - 1]
    assert marked(large, "roofline") == wanted[:2]
    assert marked(large, "errors") == wanted
    assert "No row under these filters" in large.js("document.querySelector('#steps').innerText")
    for name, value, of in (
        ("layout", "nhwc", lambda row: row["layout"]),
        ("direction", "backward", lambda row: row["direction"]),
        ("fusion", "residual+relu", fusion),
        ("op", "batch_group_norm[32]", lambda row: row["op"]),
        ("batch", "32", lambda row: str(row["shape"][0])),
        ("cache", "warm", lambda row: "cold" if row["cold"] else "warm"),
    ):
        large.js("document.getElementById('filters').reset()")
        large.js("new Promise((done) => setTimeout(done, 20))")
        assert len(marked(large, "roofline")) > 1000
        choose(large, **{"cache": "", "launch": "", name: value})
        kept = [i for i, row in enumerate(ROWS[:-1]) if KERNELS[i] and of(row) == value]
        kept += [len(ROWS) - 1] if name not in ("fusion", "op") else []
        timed = [i for i in kept if ROWS[i]["ms_median"] is not None]
        assert 0 < len(timed) < len(ROWS)
        assert marked(large, "roofline") == timed
        list_all(large)
        assert [i for i in listed(large) if KERNELS[i]] == kept
    assert large.complaints == []


def test_the_legend_hides_a_provider_everywhere(large):
    press = "[...document.querySelectorAll('#legend button')].find((b) => b.innerText === 'eager')"
    large.js(f"{press}.click()")
    assert large.js(f"{press}.getAttribute('aria-pressed')") == "false"
    for section in ("roofline", "layers", "errors", "steps"):
        found = marked(large, section)
        assert found
        assert all(ROWS[i]["provider"] != "eager" for i in found)
    list_all(large)
    assert all(ROWS[i]["provider"] != "eager" for i in listed(large))
    large.js(f"{press}.click()")
    assert any(ROWS[i]["provider"] == "eager" for i in marked(large, "roofline"))


def test_search_finds_rows_by_all_words(large):
    choose(large, cache="", launch="")
    for words, fits in (
        ("triton l3.c3 backward", lambda r: (r["provider"], layer(r), r["direction"])
         == ("triton", "l3.c3", "backward")),
        ("REFUSED", lambda r: "refused" in (r["error"] or "")),
        ("</script>", lambda r: "</script>" in (r["error"] or "")),
        ("nothing of the kind", lambda r: False),
    ):  # fmt: skip
        search(large, words)
        list_all(large)
        assert listed(large) == [i for i, row in enumerate(ROWS) if fits(row)]
    assert large.js("document.getElementById('found').value") == (
        "No row under these filters fits the search."
    )
    search(large, "moments_kernel")
    assert "200 listed" in large.js("document.getElementById('found').value")


def test_a_message_is_text_and_never_markup(chromium, pages):
    chromium.open(pages["failed"], *DESKTOP)
    (line,) = table(chromium)
    assert made_up.NASTY in line
    assert chromium.js("document.querySelectorAll('main b').length") == 0


def test_sorting_by_the_keyboard(large):
    choose(large, cache="", launch="")
    list_all(large)
    head = "[...document.querySelectorAll('#rows th')].find((h) => h.innerText === 'Median, ms')"
    large.js(f"{head}.querySelector('button').focus()")
    for order, key in (
        ("ascending", ("Enter", "Enter", 13, "\r")),
        ("descending", (" ", "Space", 32, " ")),
    ):
        large.press(*key)
        assert large.js(f"{head}.getAttribute('aria-sort')") == order
        assert large.js("document.querySelectorAll('#rows [aria-sort]').length") == 1
        found = [ROWS[i]["ms_median"] for i in listed(large)]
        known = [ms for ms in found if ms is not None]
        assert len(found) == len(ROWS)
        # Rows without a time come last in either order.
        assert found == [*sorted(known, reverse=order == "descending")] + [None] * (
            len(found) - len(known)
        )
        assert large.js("document.activeElement.innerText") == "Median, ms"


def test_wins_and_losses_are_counted(large):
    lines = large.js(
        "[...document.querySelectorAll('#glance tbody tr')].map((tr) => "
        "[...tr.cells].map((td) => td.innerText))"
    )
    assert len(lines) == 16
    for line in lines:
        mine = [i for i in FIRST if [ROWS[i]["op"], ROWS[i]["provider"]] == line[:2]]
        verdicts = [RATIOS[i].verdict for i in mine]
        counts = [verdicts.count(v) for v in ("faster", "even", "slower")]
        untimed = sum(ROWS[i]["ms_median"] is None for i in mine)
        assert [int(n) for n in line[2:7]] == [sum(counts), *counts, untimed]
        ratios = [RATIOS[i].speedup for i in mine if RATIOS[i].speedup is not None]
        if not ratios:
            assert [line[0], *line[7:]] == ["renorm", "", ""]
            continue
        assert line[7].startswith(f"{min(ratios):.2f}×")
        assert line[8].startswith(f"{max(ratios):.2f}×")


def test_charts_without_rows_say_so(chromium, pages):
    def said(section: str) -> str:
        return chromium.js(f"document.querySelector('#{section}').innerText")

    for name in ("empty", "failed"):
        chromium.open(pages[name], *DESKTOP)
        for section in ("glance", "roofline", "layers", "others", "errors", "steps"):
            assert "No row of this file has" in said(section)
            assert chromium.js(f"document.querySelectorAll('#{section} svg').length") == 0
            # There is nothing to point at either.
            assert "Point at" not in said(section)
        assert chromium.js("document.getElementById('history').hidden")
        count = {"empty": "This file has no row.", "failed": "1 of 1 rows"}[name]
        assert chromium.js("document.getElementById('found').value") == count
    chromium.open(pages["small"], *DESKTOP)
    assert "No row of this file has a whole network's step" in said("steps")
    assert said("layers").startswith("Speed-up over PyTorch's native batch norm")
    assert len(marked(chromium, "layers")) == 4


def test_history_shows_every_kept_run(chromium, pages):
    chromium.open(pages["history"], *DESKTOP)
    assert not chromium.js("document.getElementById('history').hidden")
    points = len(marked(chromium, "history"))
    before = compare_rows(ROWS[:200])
    older = [
        i for i in FIRST if i < 200 and before[i].speedup is not None and not before[i].is_peer
    ]
    newer = [i for i in FIRST if RATIOS[i].speedup is not None and not RATIOS[i].is_peer]
    assert points == len(older) + len(newer)
    assert "older" in chromium.js("document.querySelector('#history svg').textContent")


def test_pointing_at_a_mark_reads_its_row(large):
    large.js("document.querySelector('#roofline .mark').dispatchEvent("
             "new PointerEvent('pointerover', { bubbles: true }))")  # fmt: skip
    first = ROWS[large.js("Number(document.querySelector('#roofline .mark').dataset.row)")]
    said = large.js("document.querySelector('#roofline .readout').value")
    assert said.startswith(f"{first['provider']}, {first['op']}: {first['direction']}")
    assert f"{first['ms_median']:.4g} ms" in said

"""What the browser's tests share: the made-up rows, and a user's hands and eyes on the page."""

from __future__ import annotations

import json

from fusednorm.bench.views import compare_rows, layer

import synthetic_bench as made_up
from browser import Browser

DESKTOP, PHONE = (1280, 900), (360, 740)
HEADER, ROWS = made_up.large()
RATIOS = compare_rows(ROWS)
KERNELS = [row["kind"] == "kernel" for row in ROWS]
# The page opens with the cold, replayed rows; steps pass these filters by, and so does what stands
# for every case.
FIRST = [
    i
    for i, row in enumerate(ROWS)
    if row["kind"] == "step" or (row["cold"] is not False and row["graph"] is not False)
]


def choose(page: Browser, **filters: str) -> None:
    """Sets filters as a user does; "" is all."""
    for name, value in filters.items():
        page.js(f"""(() => {{
            const select = document.querySelector('[data-filter={name}]');
            const wanted = {json.dumps(value)};
            const option = [...select.options].find((o) => (wanted ? o.text === wanted
                : o.value === ''));
            select.value = option.value;
            select.dispatchEvent(new Event('change'));
        }})()""")


def marked(page: Browser, section: str) -> list[int]:
    """The rows whose marks a section shows, after all of its charts are drawn."""
    page.js(f"document.querySelector('#{section} .wider')?.click()")
    found = page.js(
        f"[...document.querySelectorAll('#{section} .mark')].map((m) => Number(m.dataset.row))"
    )
    return sorted(found)


def table(page: Browser) -> list[list[str]]:
    return page.js(
        "[...document.querySelectorAll('#rows tbody tr')].map((tr) => "
        "[...tr.cells].map((td) => td.innerText.trim()))"
    )


def listed(page: Browser) -> list[int]:
    return page.js(
        "[...document.querySelectorAll('#rows tbody tr')].map((tr) => Number(tr.dataset.row))"
    )


def list_all(page: Browser) -> None:
    page.js("[...document.querySelectorAll('#more button')].at(-1)?.click()")


def search(page: Browser, words: str) -> None:
    page.js(f"""(() => {{
        const box = document.getElementById('search');
        box.value = {json.dumps(words)};
        box.dispatchEvent(new Event('input'));
    }})()""")


def ratio_rows(indices: list[int], in_resnet: bool) -> list[int]:
    return [
        i
        for i in indices
        if KERNELS[i]
        and (layer(ROWS[i]) is not None) == in_resnet
        and RATIOS[i].speedup is not None
        and not RATIOS[i].is_peer
    ]

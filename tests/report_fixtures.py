"""The browser's tests' fixtures, a plugin of theirs: one Chromium and the pages, for each file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fusednorm.bench import html

import synthetic_bench as made_up
from browser import Browser
from report_pages import DESKTOP, HEADER, ROWS


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if os.environ.get("FUSEDNORM_NO_CHROMIUM") == "1":
        pytest.skip("FUSEDNORM_NO_CHROMIUM=1: the report is NOT tested in a browser")
    with Browser() as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    history = [({**HEADER, "commit": "older"}, ROWS[:200])]
    made = {
        "large": html.html(HEADER, ROWS),
        "small": html.html(*made_up.small()),
        "empty": html.html(HEADER, []),
        "failed": html.html(HEADER, [made_up.row(error=made_up.NASTY)]),
        "history": html.html(HEADER, ROWS, history),
    }
    for name, text in made.items():
        (folder / f"{name}.html").write_text(text)
    return {name: folder / f"{name}.html" for name in made}


@pytest.fixture
def large(chromium: Browser, pages: dict[str, Path]) -> Browser:
    chromium.open(pages["large"], *DESKTOP)
    return chromium

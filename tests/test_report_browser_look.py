"""The report's page in a real browser: legible, in bounds, named, and in need of nothing else."""

from __future__ import annotations

import importlib

import pytest

import browser
from report_pages import DESKTOP, PHONE

pytest_plugins = ("report_fixtures",)


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("name", ["large", "small", "empty", "failed", "history"])
def test_no_request_no_complaint_no_sideways_scroll(chromium, pages, name, size):
    chromium.open(pages[name], *size)
    # A figure that is not a number would be drawn nowhere and complained of nowhere.
    broken = "[...document.querySelectorAll('svg *')].filter((e) => [...e.attributes].some("
    assert chromium.js(broken + "(a) => /NaN|Infinity|undefined/.test(a.value))).length") == 0
    assert chromium.js("document.documentElement.scrollWidth") <= size[0]
    # The tables are wider than a phone and scroll in their own boxes.
    if size == PHONE and name == "large":
        box = "document.querySelector('#rows .scroll')"
        assert chromium.js(f"{box}.scrollWidth > {box}.clientWidth + 100")
    # Nothing but the scrolling boxes reaches beyond the window.
    beyond = chromium.js(
        "[...document.querySelectorAll('body *')].filter((e) => !e.closest('.scroll, .skip, svg *')"
        " && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 90))"
    )
    assert beyond == []
    assert chromium.requests == [pages[name].resolve().as_uri()]
    assert chromium.complaints == []


# WCAG's contrast of every text with what is painted behind it, from computed styles.
CONTRAST = """(() => {
  const WEIGHTS = [0.2126, 0.7152, 0.0722];
  const probe = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const parse = (colour) => {
    probe.clearRect(0, 0, 1, 1); probe.fillStyle = colour; probe.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = probe.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92
    : ((v + 0.055) / 1.055) ** 2.4)).reduce((sum, v, i) => sum + v * WEIGHTS[i], 0);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour[3] > 0.99) return colour;
      if (colour[3] > 0.01) throw new Error('half transparent ground of ' + at.outerHTML);
    }
    throw new Error('no ground');
  };
  const worst = new Map();
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || element.closest('script, noscript, title, desc')) continue;
    const style = getComputedStyle(element);
    const ink = parse(element.closest('svg') ? style.fill : style.color);
    const [a, b] = [light(ink), light(ground(element))].sort((p, q) => p - q);
    const name = `${element.tagName}.${element.className.baseVal ?? element.className}`;
    worst.set(name, Math.min(worst.get(name) ?? 99, (b + 0.05) / (a + 0.05)));
  }
  return { ground: parse(getComputedStyle(document.body).backgroundColor), worst: [...worst] };
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["large", "small", "failed"])
def test_contrast_in_light_and_dark_and_by_the_switch(chromium, pages, name, scheme):
    chromium.open(pages[name], *DESKTOP, scheme=scheme)
    grounds = []
    for _ in range(2):
        found = chromium.js(CONTRAST)
        grounds.append(sum(found["ground"][:3]))
        assert len(found["worst"]) > 10
        assert min(found["worst"], key=lambda entry: entry[1])[1] >= 4.5, sorted(
            found["worst"], key=lambda entry: entry[1]
        )[:3]
        chromium.js("document.getElementById('theme').click()")
    # As the system prefers at first, the other after a press of the button.
    dark, light = sorted(grounds)
    assert grounds[0] == (light if scheme == "light" else dark)
    assert dark < 150
    assert light > 600


def test_everything_has_a_name_for_those_who_do_not_see_it(large):
    tree = large.call("Accessibility.getFullAXTree")["nodes"]
    nameless = [
        node["role"]["value"]
        for node in tree
        if not node["ignored"]
        and node["role"]["value"] in ("button", "combobox", "searchbox", "image", "region", "form")
        and not node.get("name", {}).get("value")
    ]
    assert nameless == []
    # A placeholder is no name: it goes as soon as something is typed.
    assert large.js("[...document.querySelectorAll('input, select')].every((e) => e.labels.length)")
    roles = [node["role"]["value"] for node in tree if not node["ignored"]]
    assert roles.count("image") + roles.count("img") == large.js(
        "document.querySelectorAll('svg.chart').length"
    )
    assert large.js("[...document.querySelectorAll('th')].every((th) => th.scope)")
    assert large.js("document.documentElement.lang") == "en"
    levels = large.js("[...document.querySelectorAll('h1,h2,h3')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))


def test_letters_keep_their_size_when_the_window_narrows(large):
    def widest() -> float:
        return large.js(
            "Math.max(...[...document.querySelectorAll('svg.chart')].map((s) => "
            "Math.abs(s.getBoundingClientRect().width / s.viewBox.baseVal.width - 1)))"
        )

    assert widest() < 0.02
    size = {"width": 500, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    large.call("Emulation.setDeviceMetricsOverride", **size)
    large.js("new Promise((done) => setTimeout(done, 600))")
    assert large.js("document.documentElement.scrollWidth") <= 500
    assert widest() < 0.02


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(browser.ROOT / "tools")
    return importlib.import_module("chromium")


def test_without_a_browser_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RuntimeError, match="apt-get install -y chromium .*FUSEDNORM_NO_CHROMIUM=1"):
        browser.executable()


def test_the_package_is_installed_by_root_where_it_is_missing(tool, monkeypatch, capsys, tmp_path):
    """A made-up apt-get that puts a browser on PATH, and one that fails."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.delenv("FUSEDNORM_NO_CHROMIUM", raising=False)
    monkeypatch.setattr(tool, "NAMES", ("chromium-of-this-test",))
    apt, log = tmp_path / "apt-get", tmp_path / "log"
    apt.write_text(f"#!/bin/sh\necho $* >> {log}\nexit 1\n")
    apt.chmod(0o755)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert tool.main() == 0
    assert not log.exists()
    assert "apt-get install -y chromium" in capsys.readouterr().err
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert tool.main() == 0
    assert "apt-get install -y chromium" in capsys.readouterr().err
    found = tmp_path / "chromium-of-this-test"
    apt.write_text(f"#!/bin/sh\necho $* >> {log}\ncp {apt} {found}\n")
    assert tool.main() == 0
    assert capsys.readouterr().err == ""
    assert tool.find() == str(found)
    # There already: nothing is asked.
    log.unlink()
    assert tool.main() == 0
    assert not log.exists()


def test_doing_without_is_said_aloud(tool, monkeypatch, capsys):
    monkeypatch.setenv("FUSEDNORM_NO_CHROMIUM", "1")
    monkeypatch.setenv("PATH", "/nowhere")
    assert tool.main() == 0
    assert "NOT tested in a browser" in capsys.readouterr().out

"""Claims about the pages of results in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from _report import theme
from result_cases import write_page


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(tmp_path_factory.mktemp("comparison"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                 "disable-background-networking", "disable-component-update"):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def show(browser: Any, path: Path, width: int = 1200, scheme: str = "light") -> None:
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(path.as_uri())


MARKS = """
const colours = arguments[0];
const drawn = e => {
    const style = getComputedStyle(e), box = e.getBoundingClientRect();
    return box.width + box.height > 3 && [style.stroke, style.fill].some(colour => colours.includes(colour));
};
return [...document.querySelectorAll('figure svg')].map(svg =>
    [...svg.querySelectorAll('[id*=axes_]')].map(axes => [...axes.querySelectorAll('path, use')].filter(drawn).length));
"""
TOO_WIDE = """
const inside = e => e.parentElement && e.parentElement.closest('.box');
return [...document.querySelectorAll('body *')].filter(e => !inside(e))
    .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80));
"""


def rgb(color: str) -> str:
    return f"rgb({', '.join(str(int(color[i : i + 2], 16)) for i in (1, 3, 5))})"


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("kind", ["comparison", "run"])
def test_browser_draws_every_figure_without_an_error(
    browser: Any, page: Path, kind: str, width: int, scheme: str
) -> None:
    show(browser, page if kind == "comparison" else run_page(page), width, scheme)
    palette = theme.LIGHT if scheme == "light" else theme.DARK
    roles = {look.color for look in theme.LOOKS.values()}
    marks = browser.execute_script(MARKS, [rgb(palette[role]) for role in roles])
    assert [len(figure) for figure in marks] == ([1, 1, 3, 3, 3, 3, 3, 3] if kind == "comparison" else [1] * 6)
    assert all(count >= 6 for figure in marks for count in figure)
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('figure svg, figure [id*=axes_]')]"
        ".map(e => e.getBoundingClientRect()).map(box => [box.width, box.height])"
    )
    assert all(w > 50 and h > 50 for w, h in sizes)
    assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") in (
        [],
        ["data:,"],
    )
    assert browser.get_log("browser") == []


@pytest.mark.browser
@pytest.mark.parametrize("kind", ["comparison", "run"])
def test_browser_follows_every_link_to_what_it_names(browser: Any, page: Path, kind: str) -> None:
    source = page if kind == "comparison" else run_page(page)
    show(browser, source)
    links = browser.execute_script("return [...document.querySelectorAll('a')].map(a => a.href)")
    expected = (
        [run_page(page), page.parent / "result.json"] if kind == "comparison" else [source.parent / "result.json"]
    )
    assert [Path(unquote(urlsplit(link).path)) for link in links] == expected
    for number, link in enumerate(links):
        show(browser, source)
        browser.execute_script("document.querySelectorAll('a')[arguments[0]].click()", number)
        deadline = time.monotonic() + 20
        while browser.current_url != link and time.monotonic() < deadline:
            time.sleep(0.02)
        text = browser.execute_script("return document.body.innerText")
        assert json.loads(text)["format"] == 1 if link.endswith(".json") else text.startswith("One run")
    assert browser.get_log("browser") == []


@pytest.mark.browser
@pytest.mark.parametrize("kind", ["comparison", "run"])
def test_browser_on_a_phone_scrolls_boxes_but_not_the_page(browser: Any, page: Path, kind: str) -> None:
    show(browser, page if kind == "comparison" else run_page(page), width=390)
    assert browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    assert browser.execute_script(TOO_WIDE) == []
    spilt = "return [...document.querySelectorAll('th, td')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert browser.execute_script(spilt) == 0
    small = "return [...document.querySelectorAll('figure svg text')].map(t => t.getBoundingClientRect().height)"
    assert min(browser.execute_script(small)) > 8


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two CSS colours, rgb(r, g, b), as WCAG 2.2 defines it."""

    def luminance(color: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.browser
def test_browser_text_has_contrast_in_both_schemes(browser: Any, page: Path) -> None:
    papers = []
    for scheme in ("light", "dark"):
        show(browser, page, scheme=scheme)
        papers.append(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
        words = browser.execute_script(
            "return [...new Set([...document.querySelectorAll('h1,h2,p,td,th,dt,dd,a,figcaption,small')]"
            ".map(e => getComputedStyle(e).color).concat([...document.querySelectorAll('svg text')]"
            ".map(t => getComputedStyle(t).fill)))]"
        )
        assert len(words) >= 3
        assert all(contrast(color, papers[-1]) >= 4.5 for color in words)
        swatches = "return [...document.querySelectorAll('.key i')].map(e => getComputedStyle(e).backgroundColor)"
        assert all(contrast(color, papers[-1]) >= 3 for color in browser.execute_script(swatches))
    assert contrast(*papers) > 10


def run_page(page: Path) -> Path:
    return next(page.parent.glob("runs/*/report.html"))

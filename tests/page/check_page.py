"""The pages in a real browser: `make test-page`. Not part of `make test`, which needs no browser."""

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.report import build
from carft_fast.reports import page as html_report

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.fail(f"no Chromium: none of {', '.join(BROWSERS)} is on the PATH (Debian: chromium-headless-shell)")
    with sync_playwright() as playwright:
        # Chromium's own sandbox refuses to start for root
        browser = playwright.chromium.launch(executable_path=found, chromium_sandbox=os.getuid() != 0)
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=["benchmarks", "cells"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The benchmark report; and a small page with every kind of cell."""
    target = tmp_path_factory.mktemp("page") / f"{request.param}.html"
    target.write_text(build() if request.param == "benchmarks" else cells(), encoding="utf-8")
    return target


ROWS = [("b", 10.0), ("a", (9.5, "9.50 (9 to 11)")), ("d", None), ("c", 1234.5), ("<i>", -1)]


def cells() -> str:
    def draw(axes: Any) -> None:
        axes.plot([1, 2], [3, 4])

    table = html_report.table(("name", "number"), ROWS, search="rows")
    return html_report.page(
        "Cells", "", {"Table": [table], "Chart": [html_report.charts(html_report.chart("x", draw))]}
    )


def opened(browser: Browser, file: Path, *, width: int = 1200, dark: bool = False) -> tuple[Page, list[str]]:
    """The page, and a list of what it complained about and what it asked the network for."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light")
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith("file:") else complaints.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_load_state("networkidle")
    return page, complaints


def test_nothing_is_fetched_and_nothing_complained_about(browser: Browser, file: Path) -> None:
    page, complaints = opened(browser, file)
    for button in page.locator("th button").all()[:40]:
        if button.is_visible():
            button.click()
    assert complaints == []
    # and a page that does fetch is found out
    page.evaluate("() => { const i = new Image(); i.src = 'https://example.org/x.png'; document.body.append(i); }")
    page.wait_for_timeout(200)
    assert any("example.org" in complaint for complaint in complaints)
    page.close()


def test_charts_are_drawn(browser: Browser, file: Path) -> None:
    page, _ = opened(browser, file)
    boxes = page.evaluate(
        "() => [...document.querySelectorAll('figure svg')].map(svg => { const box = svg.getBoundingClientRect();"
        " const marks = [...svg.querySelectorAll('path')].filter(p => p.getTotalLength() > 50).length;"
        " return [box.width, box.height, marks, svg.querySelectorAll('text').length]; })"
    )
    assert boxes
    for width, height, marks, words in boxes:
        assert width > 200
        assert height > 100
        assert marks >= 3
        assert words >= 4
    # inks are variables of the page: none is left that only light or only dark shows
    assert page.evaluate("() => getComputedStyle(document.querySelector('figure svg text')).fill") != ""
    assert "#0000a" not in page.content()
    page.close()


def test_tables_sort_and_search(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "cells.html"
    file.write_text(cells(), encoding="utf-8")
    page, _ = opened(browser, file)

    def names() -> list[str]:
        return page.locator("tbody tr:not([hidden]) td:first-child").all_inner_texts()

    by_number, by_name = page.locator("th button").nth(1), page.locator("th button").nth(0)
    by_number.click()
    assert names() == ["<i>", "a", "b", "c", "d"]  # by value, and what was not measured last
    assert page.locator("th").nth(1).get_attribute("aria-sort") == "ascending"
    by_number.click()
    assert names() == ["c", "b", "a", "<i>", "d"]
    by_name.focus()
    page.keyboard.press("Enter")
    assert names() == ["<i>", "a", "b", "c", "d"]
    page.locator("input[type=search]").fill("9.50")
    assert names() == ["a"]
    page.close()


def test_every_table_of_the_report_sorts(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(build(), encoding="utf-8")
    page, _ = opened(browser, file)
    page.evaluate("() => document.querySelectorAll('details').forEach(d => d.open = true)")
    tables = page.locator("table")
    assert tables.count() >= 12
    for i in range(tables.count()):
        table = tables.nth(i)
        before = sorted(table.locator("tbody tr").all_inner_texts())
        table.locator("th button").last.click()
        assert table.locator("th").last.get_attribute("aria-sort") == "ascending"
        assert sorted(table.locator("tbody tr").all_inner_texts()) == before
    page.close()


def test_a_phone_has_no_horizontal_scroll(browser: Browser, file: Path) -> None:
    page, _ = opened(browser, file, width=360)
    page.evaluate("() => document.querySelectorAll('details').forEach(d => d.open = true)")
    width = "() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    assert page.evaluate(width) == [360, 360]
    for table in page.locator(".scroll").all():
        box = table.bounding_box()
        assert box is not None
        assert box["x"] + box["width"] <= 360
    page.close()


COLOURS = """() => {
  const of = (selector, name) => [...document.querySelectorAll(selector)].map(e => getComputedStyle(e)[name]);
  return [...of("body", "backgroundColor"), of("figure svg text", "fill")[0],
    ...["stroke", "fill"].flatMap(name => of(`figure svg path[style*="${name}: var(--s"]`, name))];
}"""


def test_dark_differs_and_can_be_read(browser: Browser, file: Path) -> None:
    shades = {}
    for dark in (False, True):
        page, _ = opened(browser, file, dark=dark)
        shades[dark] = page.evaluate(COLOURS)
        page.close()
    (light_page, light_ink, *light_lines), (dark_page, dark_ink, *dark_lines) = shades[False], shades[True]
    assert brightness(light_page) > 0.9
    assert brightness(dark_page) < 0.2
    assert abs(brightness(light_page) - brightness(light_ink)) > 0.6
    assert abs(brightness(dark_page) - brightness(dark_ink)) > 0.6
    assert light_lines
    assert all(brightness(line) < 0.6 for line in light_lines)
    assert all(brightness(line) > 0.45 for line in dark_lines)


def brightness(color: str) -> float:
    """Of "rgb(r, g, b)", 0 to 1."""
    red, green, blue = (float(part) for part in color[color.index("(") + 1 : -1].split(",")[:3])
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255


def test_dark_pixels_differ(browser: Browser, file: Path) -> None:
    means = {}
    for dark in (False, True):
        page, _ = opened(browser, file, dark=dark)
        means[dark] = float(imread(io.BytesIO(page.screenshot()))[..., :3].mean())
        page.close()
    assert means[False] > 0.8
    assert means[True] < 0.35

"""The report in a real browser: it renders, is quiet, fits its window, follows the colour scheme, sorts and scrolls.

Needs Chromium with its driver (Debian: apt-get install chromium chromium-driver) and selenium; skipped where they are missing.
"""

from __future__ import annotations

import base64
import csv as csvlib
import html
import io
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support.report_sample import sample_run
from xtoken_core.report.compare import write_comparison
from xtoken_core.report.page import write_report

selenium = pytest.importorskip("selenium", reason="selenium is not installed (extra [test])")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="no Chromium with its driver (apt-get install chromium chromium-driver)"
    ),
]

SIZES = {"laptop": (1280, 800), "phone": (390, 844)}


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("report")
    one, two = sample_run(folder / "one"), sample_run(folder / "two", seed=1, shift=0.07, steps=300)
    framed = folder / "framed.html"
    run = write_report(one, folder / "one")
    source = html.escape(run.read_text(), quote=True)  # as KFP's user interface shows an HTML artifact (HTMLViewer.tsx)
    framed.write_text(
        f'<!DOCTYPE html><iframe sandbox="allow-scripts" srcdoc="{source}" style="width:100%;height:600px"></iframe>'
    )
    return {"run": run, "comparison": write_comparison([one, two], folder / "compare.html"), "framed": framed}


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def open_page(browser, page: Path, size: str = "laptop", scheme: str = "light") -> None:
    """Opens a page and asserts that the console stays silent."""
    width, height = SIZES[size]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    browser.get(page.as_uri())
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["run", "comparison"])
def test_page_fits_and_follows_the_scheme(browser, pages, name, size, scheme):
    open_page(browser, pages[name], size, scheme)
    assert browser.execute_script("return document.documentElement.scrollWidth") == SIZES[size][0]
    paper = brightness(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    ink = brightness(browser.execute_script("return getComputedStyle(document.body).color"))
    assert (paper > 200 and ink < 60) if scheme == "light" else (paper < 40 and ink > 200)
    assert browser.execute_script("return performance.getEntriesByType('resource').map(r => r.name)") == []


CONTRASTS = """
const pen = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d", {willReadFrequently: true});
function light(layers) {  // relative luminance of colours painted over one another (WCAG 2)
  pen.clearRect(0, 0, 1, 1);
  for (const color of layers) { pen.fillStyle = color; pen.fillRect(0, 0, 1, 1); }
  const [r, g, b] = [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
return [...document.querySelectorAll("body *")].filter(e => e.checkVisibility() && !e.closest("svg")
    && [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())).map(e => {
  const layers = [];
  for (let up = e; up; up = up.parentElement) layers.unshift(getComputedStyle(up).backgroundColor);
  const [a, b] = [light([...layers, getComputedStyle(e).color]), light(layers)].sort((x, y) => x - y);
  return [(b + 0.05) / (a + 0.05), e.tagName + " " + e.className + ": " + e.textContent.trim().slice(0, 40)];
}).filter(([ratio, _]) => ratio < 4.5)
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["run", "comparison"])
def test_text_stands_out_from_its_paper(browser, pages, name, scheme):
    """Contrast as WCAG's level AA asks for, heat maps included."""
    open_page(browser, pages[name], scheme=scheme)
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.execute_script(CONTRASTS) == []


@pytest.mark.parametrize("name", ["run", "comparison"])
def test_tables_fit_a_laptop(browser, pages, name):
    """Only a phone, or many models, make a table scroll."""
    open_page(browser, pages[name])
    tables = browser.find_elements("css selector", "#results .scroll")
    assert tables
    for table in tables:
        assert browser.execute_script("return arguments[0].scrollWidth <= arguments[0].clientWidth", table), table.text


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_charts_are_visible(browser, pages, size, scheme):
    """Every chart has height, ticks inside the card that do not run into each other, and ink of its curve's colour."""
    open_page(browser, pages["run"], size, scheme)
    charts = browser.find_elements("css selector", ".chart")
    assert len(charts) >= 12
    for chart in charts:
        title = chart.find_element("tag name", "b").text
        picture = screenshot(browser, chart.find_element("css selector", ".area"))
        assert picture.shape[0] >= 150 and picture.shape[1] >= 200, title
        color = browser.execute_script(
            "return getComputedStyle([...arguments[0].querySelectorAll('.line, .dots')].at(-1)).stroke", chart
        )
        near = np.abs(picture.astype(int) - rgb(color)).sum(-1) < 90
        assert near.sum() > 80, f"{title}: no curve to be seen"
        labels = [label.rect for label in chart.find_elements("css selector", ".x-axis span")]
        assert all(a["x"] + a["width"] <= b["x"] for a, b in zip(labels, labels[1:])), title


def test_pictures_are_visible(browser, pages):
    open_page(browser, pages["run"])
    for selector in (".dag svg", ".density svg", ".intervals", ".bars", "table.block"):
        picture = screenshot(browser, browser.find_element("css selector", selector))
        assert min(picture.shape[:2]) > 60 and picture.std() > 5, selector
    assert len(browser.find_elements("css selector", ".task")) == 11
    for box in browser.find_elements("css selector", ".task"):
        edges = browser.execute_script(
            "const [box, ...text] = [...arguments[0].children].slice(1).map(e => e.getBoundingClientRect());"
            "return text.every(t => t.left >= box.left && t.right <= box.right && t.top >= box.top && t.bottom <= box.bottom)",
            box,
        )
        assert edges, f"{box.text} runs out of its box"


def test_tables_sort(browser, pages):
    open_page(browser, pages["run"])
    table = browser.find_element("css selector", "#results table")

    def column(index: int) -> list[str]:
        return [cell.text.split("\n")[0] for cell in table.find_elements("css selector", f"tbody td:nth-child({index})")]

    names = column(1)
    heads = table.find_elements("css selector", "th button")
    heads[1].click()
    assert [float(x) for x in column(2)] == sorted(float(x) for x in column(2)) and column(1) != names
    heads[1].click()
    assert [float(x) for x in column(2)] == sorted((float(x) for x in column(2)), reverse=True)
    heads[2].click()
    assert column(3)[-1] == "-"  # what is missing comes last
    heads[0].click()
    assert column(1) == sorted(names, key=str.lower)


def test_pointer_shows_values(browser, pages):
    from selenium.webdriver.common.action_chains import ActionChains

    open_page(browser, pages["run"])
    area = browser.find_element("css selector", ".chart .area")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", area)
    ActionChains(browser).move_to_element(area).perform()
    tip = browser.find_element("css selector", ".tip")
    assert tip.text.startswith("optimizer step 60\n") and "student" in tip.text and "twin" in tip.text
    ActionChains(browser).move_to_element(browser.find_element("css selector", "nav")).perform()
    assert not browser.find_elements("css selector", ".tip")


@pytest.mark.parametrize("name", ["run", "comparison"])
def test_links_lead_to_their_sections(browser, pages, name):
    open_page(browser, pages[name], "phone")
    check_links(browser)
    assert browser.get_log("browser") == []


def test_in_the_sandboxed_frame_of_kfp(browser, pages):
    open_page(browser, pages["framed"])
    browser.switch_to.frame(0)
    assert "Distillation helped" in browser.find_element("css selector", ".verdict").text
    check_links(browser)
    head = browser.find_element("css selector", "#results th:nth-child(2) button")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", head)
    head.click()
    assert browser.find_element("css selector", "#results th:nth-child(2)").get_attribute("aria-sort") == "ascending"
    browser.switch_to.default_content()
    assert browser.get_log("browser") == [] and browser.current_url == pages["framed"].as_uri()


def test_text_of_models_is_text(browser, pages):
    open_page(browser, pages["run"])
    assert "<student_before>" in browser.find_element("id", "samples").text
    assert '"thermodynamics" & its\nlimits' in browser.find_element("id", "samples").text


def check_links(browser) -> None:
    """Every link of the page brings its section to the top (or the page to its end)."""
    links = browser.find_elements("css selector", "nav a")
    assert len(links) >= 5
    for link in links:
        link.click()
        section = link.get_attribute("href").partition("#")[2]
        top, end = browser.execute_script(
            "const e = document.scrollingElement;"
            "return [document.getElementById(arguments[0]).getBoundingClientRect().top, e.scrollHeight - e.scrollTop - innerHeight]",
            section,
        )
        assert -2 <= top <= 80 or end < 2, section


def screenshot(browser, element) -> np.ndarray:
    """The pixels of an element, uint8 [height, width, 3]."""
    from PIL import Image

    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(element.screenshot_as_base64))).convert("RGB"))


def rgb(color: str) -> np.ndarray:
    return np.array([float(part) for part in color.partition("(")[2].rstrip(")").split(",")[:3]])


def brightness(color: str) -> float:
    return float(rgb(color).mean())


def test_a_chart_is_smoothed_and_changes_its_axis(browser, pages):
    open_page(browser, pages["run"])
    figure = next(f for f in browser.find_elements("css selector", ".chart") if "cross-entropy part" in f.text)
    tools = {button.text: button for button in figure.find_elements("css selector", ".tools button")}

    def shape() -> str:
        return figure.find_element("css selector", ".line").get_attribute("d")

    def roughness() -> float:
        ys = np.array([float(spot.split()[1]) for spot in shape()[1:].split("L")])
        return float(np.abs(np.diff(ys)).sum())

    raw, rough = shape(), roughness()
    tools["smooth"].click()
    assert roughness() < rough / 2 and shape().count("L") == raw.count("L")
    tools["smooth"].click()
    assert shape() == raw
    tools["log"].click()
    assert "log scale" in figure.text and shape() != raw
    tools["log"].click()
    assert "log scale" not in figure.text and shape() == raw
    assert browser.get_log("browser") == []


def test_a_table_is_saved_as_it_is_sorted(browser, pages, tmp_path):
    open_page(browser, pages["run"])
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    box = browser.find_element("css selector", "#results .scroll")
    csv, json_ = box.find_elements("xpath", "following-sibling::p[1]/button")
    csv.click()
    json_.click()
    deadline = time.monotonic() + 120
    while not (any(tmp_path.glob("*.csv")) and any(tmp_path.glob("*.json"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    rows = list(csvlib.reader(next(tmp_path.glob("*.csv")).open()))
    told = json.loads(next(tmp_path.glob("*.json")).read_text())
    names = [cell.text.split("\n")[0] for cell in box.find_elements("css selector", "tbody td:first-child")]
    assert [row[0] for row in rows[1:]] == names == [row[rows[0][0]] for row in told]
    assert float(rows[1][1]) == told[0][rows[0][1]]

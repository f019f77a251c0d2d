"""The report in a real browser: quiet, offline, usable by mouse and keyboard, at any width."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from support import networks
from support.report_pages import AWKWARD, attributes_of, cells_of, structured
from support.simulated import from_predictions

import pyablate as pa
from pyablate.result import AblationResult

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this system"),
]

CURVES = pd.DataFrame(
    {
        "ranking": ["l1"] * 3 + ["random (layer)"] * 3,
        "seed": [-1] * 3 + [0] * 3,
        "fraction": [0, 0.5, 1] * 2,
        "accuracy": [0.9, 0.7, 0.1, 0.9, 0.4, 0.1],
    }
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as play:
        # Chromium's own sandbox does not work for root, as whom containers run.
        started = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


Open = Callable[..., "Page"]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Open a report; at the end the browser must have had nothing to complain or to load."""
    contexts, complaints = [], []

    def opened(path: Path, where: str = "", width: int = 1200, **options: Any) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda request: (
                request.url.startswith((path.as_uri(), "data:", "blob:"))
                or complaints.append(request.url)
            ),
        )
        page.goto(path.as_uri() + where)
        page.wait_for_selector("main[aria-busy=false]")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture(scope="module")
def result() -> AblationResult:
    return structured(60, 12, 120, 3)


@pytest.fixture(scope="module")
def report(result: AblationResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    sets = pd.DataFrame({"class": ["class 3"], "units": [("block0.relu:1",)]})
    shade = np.arange(len(result.labels), dtype=np.float32) / len(result.labels)
    images = np.broadcast_to(shade[:, None, None, None], (len(shade), 1, 8, 8)).copy()
    result.report(
        path,
        attributes=attributes_of(result, 5),
        data=(images, result.labels),
        curves=CURVES,
        minimal_sets=sets,
    )
    return path


def points(share: float) -> str:
    return f"{100 * share:.2f}".replace("-", "\u2212")


def figures(texts: list[str]) -> list[float]:
    """Points as shares; the page rounds single precision, so halves may fall either way."""
    return [float(text.replace("\u2212", "-")) / 100 for text in texts]


def column(page: Page, number: int) -> list[str]:
    return page.locator(f"#unit-table tbody td:nth-child({number})").all_inner_texts()


def picture(page: Page) -> str:
    """What the heat map shows, as the canvas gives it."""
    return str(page.evaluate("document.querySelector('.heat canvas').toDataURL()"))


def wait_for_card(page: Page, title: str) -> None:
    """Wait until the card is of this; a function to wait for would be evaluated as a string there.

    The page allows no such thing, and only a slow machine asks for it twice.
    """
    from playwright.sync_api import expect

    expect(page.locator("#card-title")).to_have_text(title)


def title_of_card(page: Page) -> str:
    page.wait_for_selector("#card[open]")
    return page.locator("#card-title").inner_text()


def test_overview(report, result, open_page):
    page = open_page(report)
    sections = page.locator("main > section > h2").all_inner_texts()
    assert sections == [
        *("Summary", "Layers", "Units and classes", "Units", "Classes"),
        *("Attributes", "Removing many units"),
    ]
    summary = page.locator("#summary").inner_text()
    assert f"{100 * result.baseline_accuracy:.2f} %" in summary
    assert points(result.max_class_drop.max()) in summary
    assert "0 of 300" in summary
    assert page.locator("#layers circle").count() >= len(result.units)
    classes = page.locator("#class-table tbody tr").count()
    assert classes == result.classes


def test_sorts_the_table(report, result, open_page):
    page = open_page(report)
    falling = np.sort(result.max_class_drop)[::-1]
    assert figures(column(page, 3)) == pytest.approx(falling[:25], abs=6e-5)
    page.get_by_role("button", name="Accuracy drop").click()
    drops = np.sort(result.accuracy_drop)
    assert figures(column(page, 2)) == pytest.approx(drops[::-1][:25], abs=6e-5)
    head = page.locator("#unit-table th", has_text="Accuracy drop")
    assert head.get_attribute("aria-sort") == "descending"
    page.keyboard.press("Enter")  # the button keeps the focus
    assert figures(column(page, 2)) == pytest.approx(drops[:25], abs=6e-5)
    assert head.get_attribute("aria-sort") == "ascending"
    page.get_by_role("button", name="Next").click()
    assert figures(column(page, 2)) == pytest.approx(drops[25:50], abs=6e-5)


def test_searches_the_table(report, result, open_page):
    page = open_page(report)
    page.get_by_label("Search").fill("block1.relu:3")
    expected = [x for x in result.units["label"] if x.startswith("block1.relu:3")]
    assert sorted(column(page, 1)) == sorted(expected)
    k = int(result.max_class[-1])
    page.get_by_label("Search").fill(f"BLOCK2 {k} class")  # every word, in label or class
    texts = [f"{x} class {k}" for x, k in zip(result.units["label"], result.max_class, strict=True)]
    hits = ["block2" in text and str(k) in text for text in texts]
    assert sorted(column(page, 1)) == sorted(result.units["label"][hits])
    page.get_by_label("Search").fill("no such unit")
    assert column(page, 1) == []
    assert page.get_by_text("No unit matches.").is_visible()


def test_card_of_a_unit_by_mouse(report, result, open_page):
    page = open_page(report)
    worst = int(result.max_class_drop.argmax())
    page.locator("#unit-table tbody tr").first.click()
    assert title_of_card(page) == result.units["label"][worst]
    hurt = page.locator("#card section", has_text="Classes hurt and helped")
    first = hurt.locator("tbody tr").first.locator("td").all_inner_texts()
    k = result.max_class[worst]
    assert first[0] == f"class {k}"
    assert first[1] == f"+{points(result.max_class_drop[worst])}"
    assert first[3:5] == [str(result.lost[worst, k]), str(result.gained[worst, k])]
    assert first[7] == "more than chance"
    assert page.locator("#card img").count() > 0
    assert page.locator("#card img").first.evaluate("image => image.naturalWidth") == 8
    page.locator("#card .next").click()
    second = int(np.argsort(-result.max_class_drop, kind="stable")[1])
    wait_for_card(page, result.units["label"][second])
    page.go_back()
    wait_for_card(page, result.units["label"][worst])
    page.get_by_role("button", name="Close").click()
    assert not page.locator("#card").is_visible()


def test_card_of_a_unit_with_what_attributes_say_of_classes(result, open_page, tmp_path):
    table = cells_of(result)
    result.report(tmp_path / "report.html", attributes=table)
    unit = int(result.max_class_drop.argmax())
    page = open_page(tmp_path / "report.html", f"#unit/{result.units['label'][unit]}")
    section = page.locator("#card section", has_text="Classes predicted and measured")
    assert section.locator("th").all_inner_texts() == ["Class", "Drop", "auc", "own"]
    rows = section.locator("tbody tr")
    assert rows.count() == result.classes
    first = rows.first.locator("td").all_inner_texts()
    assert first[:2] == [
        f"class {result.max_class[unit]}",
        f"+{points(result.max_class_drop[unit])}",
    ]
    values = table["own"].to_numpy()[unit]
    assert rows.locator("td:nth-child(4) b").count() == 3
    assert float(first[3]) == pytest.approx(values[result.max_class[unit]], rel=1e-3)
    within = stats.spearmanr(values, result.class_accuracy_drop[unit]).statistic
    assert f"own +{within:.2f}" in section.inner_text()


def test_confusion_change(report, result, open_page):
    worst = int(result.max_class_drop.argmax())
    label = result.units["label"][worst]
    page = open_page(report, f"#unit/{label}")
    assert title_of_card(page) == label
    shown = page.locator(".matrix tbody tr")
    predicted = result.predictions(worst)[0]
    for row in range(shown.count()):
        k = int(shown.nth(row).locator("th").inner_text().split()[1])
        cells = shown.nth(row).locator("td").all_inner_texts()
        numbers = [int(c.replace("\u2212", "-").replace("\u00b7", "0")) for c in cells]
        assert sum(numbers) == 0
        kept = ((predicted == k) & (result.labels == k)).sum()
        before = ((result.baseline == k) & (result.labels == k)).sum()
        assert numbers[row] == kept - before
    assert shown.count() > 1


def test_everything_by_keyboard(report, result, open_page):
    page = open_page(report)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the summary"
    page.locator("#unit-table tbody a").first.focus()
    page.keyboard.press("Enter")
    worst = result.units["label"][int(result.max_class_drop.argmax())]
    assert title_of_card(page) == worst
    page.keyboard.press("Escape")
    assert not page.locator("#card").is_visible()
    # A point of the layers' chart: the last is the largest.
    page.locator("#layers .points").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#live").inner_text().startswith(worst)
    page.keyboard.press("Enter")
    assert title_of_card(page) == worst
    page.keyboard.press("Escape")
    # Reached by the Tab key alone: every control of the page has its turn.
    page.locator("#theme").focus()
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.getAttribute('role')"))
    assert "application" in seen


def test_heat_map_is_sorted_read_and_zoomed(report, result, open_page):
    page = open_page(report)
    section = page.locator("#heatmap")
    before = picture(page)
    section.get_by_label("Sort units by").select_option("max_class_drop")
    section.get_by_label("Within layers").uncheck()
    assert picture(page) != before
    section.get_by_label("Sort classes by").select_option("harm")
    drops = result.class_accuracy_drop
    k = int(drops.mean(axis=0).argmax())
    worst = int(result.max_class_drop.argmax())
    page.locator(".heat").focus()
    page.keyboard.press("ArrowRight")
    spoken = page.locator("#live").inner_text()
    assert spoken.startswith(f"{result.units['label'][worst]} \u00b7 class {k}.")
    sign = "+" if drops[worst, k] > 0 else ""
    assert f"drop {sign}{points(drops[worst, k])} points" in spoken
    page.keyboard.press("Enter")
    assert title_of_card(page) == result.units["label"][worst]
    page.keyboard.press("Escape")
    page.locator(".heat").focus()
    page.keyboard.press("c")
    assert title_of_card(page) == f"class {k}"
    page.keyboard.press("Escape")
    whole = picture(page)
    section.get_by_role("button", name="Zoom in").click()
    closer = picture(page)
    assert closer != whole
    section.get_by_role("button", name="Show everything").click()
    assert picture(page) == whole
    section.get_by_label("Only more than chance").check()
    assert picture(page) != whole
    for order in ("cluster", "attribute:attribute_0", "accuracy_drop", "network"):
        now = picture(page)
        section.get_by_label("Sort units by").select_option(order)
        assert picture(page) != now, order


def test_heat_map_by_pointer(report, result, open_page):
    page = open_page(report)
    canvas = page.locator(".heat canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    at = box["x"] + box["width"] - 4, box["y"] + 26  # last unit, first class
    page.mouse.move(*at)
    tip = page.locator("#tip").inner_text()
    assert tip.startswith(f"{result.units['label'].iloc[-1]} \u00b7 class 0")
    assert f"lost {result.lost[-1, 0]}, gained {result.gained[-1, 0]} of 120" in tip
    page.mouse.click(*at)
    assert title_of_card(page) == result.units["label"].iloc[-1]
    page.keyboard.press("Escape")
    whole = picture(page)
    page.mouse.wheel(0, -400)  # the map has the focus now, so the wheel zooms it
    page.wait_for_timeout(100)
    assert picture(page) != whole


def test_card_of_a_class(report, result, open_page):
    page = open_page(report)
    page.locator("#class-table").get_by_role("link", name="class 3", exact=True).click()
    assert title_of_card(page) == "class 3"
    card = page.locator("#card")
    assert f"{100 * result.baseline_class_accuracy[3]:.2f} %" in card.inner_text()
    assert "Without these units the class is lost: block0.relu:1." in card.inner_text()
    rows = card.locator("section", has_text="Most important units").locator("tbody tr")
    order = np.argsort(-result.class_accuracy_drop[:, 3], kind="stable")
    assert rows.first.locator("td").first.inner_text() == result.units["label"][order[0]]


def test_attributes_and_curves(report, open_page):
    page = open_page(report)
    section = page.locator("#attributes")
    assert section.locator("tbody tr").count() == 5
    section.locator("tbody button").nth(4).click()
    name = section.locator("tbody tr").nth(1).locator("th").inner_text()
    assert name in section.locator("[aria-live]").inner_text()
    assert section.locator("circle:not(.ring)").count() == 20
    pressed = section.locator("[aria-pressed=true]")
    assert (pressed.count(), pressed.evaluate("b => b === document.activeElement")) == (1, True)
    assert page.locator("#curves path").count() >= 2
    page.locator("#curves summary").click()
    assert "40" in page.locator("#curves table").inner_text()


def test_names_stay_text(open_page, tmp_path):
    result = structured(30, len(AWKWARD), 60, 2, AWKWARD)
    awkward = [f"{name}:{row}" for row, name in enumerate(AWKWARD * 6)]
    result = AblationResult(
        units=result.units.assign(label=awkward, layer=[AWKWARD[row % 2] for row in range(30)]),
        labels=result.labels,
        baseline=result.baseline,
        flips=result.flips,
        class_names=AWKWARD,
        intervention=AWKWARD[0],
    )
    table = attributes_of(result, 2).rename(columns={"attribute_1": AWKWARD[1]})
    curves = {AWKWARD[1]: CURVES.assign(ranking=AWKWARD[0], seed=-1)}
    path = tmp_path / "r.html"
    result.report(
        path, attributes=table, curves=curves, title=AWKWARD[1], provenance={AWKWARD[0]: AWKWARD[1]}
    )
    page = open_page(path)
    assert page.title() == AWKWARD[1]
    assert page.locator("h1").inner_text() == AWKWARD[1]
    names = page.locator("#class-table tbody td:first-child").all_inner_texts()
    assert {" ".join(name.split()) for name in names} == {" ".join(n.split()) for n in AWKWARD}
    for row in range(2):
        page.evaluate("hash => location.hash = hash", f"#class/{row}")
        wait_for_card(page, AWKWARD[row])
    page.keyboard.press("Escape")
    page.locator("#unit-table tbody a").first.click()
    page.wait_for_selector("#card[open]")
    page.locator("#card tbody a").first.hover()
    page.keyboard.press("Escape")
    page.locator(".heat").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("window.hurt") is None
    assert page.locator("script").count() == 4
    assert page.locator("main img, dialog img, body > img").count() == 0


@pytest.fixture
def visits() -> Iterator[tuple[str, list[str]]]:
    """Address of a server, and the paths that were asked for."""
    asked: list[str] = []

    class Listen(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Listen) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_the_page_is_not_allowed_the_network(browser, report, tmp_path, visits):
    address, asked = visits
    bare = tmp_path / "bare.html"
    bare.write_text("<!doctype html><main aria-busy=false></main>")
    context = browser.new_context()
    page = context.new_page()
    try_all = """async (address) => {
      await fetch(address + "/fetch").catch(() => {});
      const image = document.createElement("img");
      image.src = address + "/image";
      const style = document.createElement("style");
      style.textContent = `main { background: url("${address}/style") }`;
      const script = document.createElement("script");
      script.textContent = "window.hurt = 1";
      document.body.append(image, style, script);
    }"""
    for path in (bare, report):
        asked.clear()
        page.goto(path.as_uri())
        page.wait_for_selector("main[aria-busy=false]", state="attached")
        page.evaluate(try_all, address)
        page.wait_for_timeout(300)
        if path == bare:  # which shows that the attempts are real
            assert set(asked) == {"/fetch", "/image", "/style"}
            assert page.evaluate("window.hurt") == 1
    assert asked == []
    assert page.evaluate("window.hurt") is None
    context.close()


@pytest.mark.parametrize("where", ["", "#unit/block1.relu:3", "#class/2"])
def test_narrow(report, open_page, where):
    page = open_page(report, where, width=400, has_touch=True)
    over = "e => e.scrollWidth - e.clientWidth"
    assert page.evaluate(f"({over})(document.documentElement)") <= 0
    if where:
        assert page.locator("#card").evaluate(over) <= 0
    assert page.locator(".heat canvas").bounding_box()["width"] <= 400  # type: ignore[index]


def test_dark_and_light(report, open_page):
    def brightness(page: Page) -> float:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return float(np.mean([int(x) for x in re.findall(r"\d+", colour)[:3]]))

    dark = open_page(report, color_scheme="dark")
    assert brightness(dark) < 60
    night = picture(dark)
    dark.get_by_role("button", name="Switch to light colours").click()
    assert brightness(dark) > 200
    assert picture(dark) != night
    light = open_page(report, color_scheme="light")
    assert brightness(light) > 200


def test_print(report, open_page, tmp_path):
    page = open_page(report, color_scheme="dark")
    page.emulate_media(media="print")
    assert not page.locator("#sections").is_visible()
    assert not page.locator("#heatmap .controls").is_visible()
    assert page.locator("#unit-table").is_visible()
    page.pdf(path=tmp_path / "report.pdf")
    assert os.path.getsize(tmp_path / "report.pdf") > 10_000
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"  # as it was before


def test_without_javascript(browser, report):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert "draws itself with JavaScript" in page.locator("body").inner_text()
    context.close()


def test_two_thousand_units_and_a_hundred_classes(open_page, tmp_path):
    result = structured(2000, 100, 20, 8)
    random = np.random.default_rng(0)
    images = random.random((2000, 1, 28, 28), dtype=np.float32)
    path = tmp_path / "large.html"
    result.report(path, attributes=attributes_of(result, 8), data=(images, result.labels))
    assert path.stat().st_size < 10_000_000
    begun = time.monotonic()
    page = open_page(path)
    assert time.monotonic() - begun < 60  # a busy machine; some 2 s on an idle one
    worst = result.units["label"][int(result.max_class_drop.argmax())]
    assert column(page, 1)[0] == worst
    page.locator("#heatmap").get_by_label("Sort units by").select_option("cluster")
    page.locator("#heatmap").get_by_label("Sort classes by").select_option("cluster")
    for _ in range(6):
        page.locator("#heatmap").get_by_role("button", name="Zoom in").click()
    page.get_by_label("Search").fill(worst)
    page.locator("#unit-table tbody a", has_text=re.compile(f"^{re.escape(worst)}$")).click()
    assert title_of_card(page) == worst


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> tuple[AblationResult, Path]:
    """A report of 300 classes, a third of them without images, an attribute with an outlier."""
    full = structured(40, 300, 4, 2)
    kept = full.labels % 3 > 0
    predictions = full.predictions(slice(None))[:, kept]
    result = from_predictions(
        predictions, full.baseline[kept], full.labels[kept], 300, full.units["layer"].tolist()
    )
    folder = tmp_path_factory.mktemp("sparse")
    for name in ("one", "other"):
        (folder / name).mkdir()
        curves = CURVES.assign(chance=0.1, loss=1.0, flops=4e8)
        curves.to_csv(folder / name / "curve.csv", index=False)
    attributes = attributes_of(result, 1)
    attributes.iloc[0] = 1e4
    sets = pd.DataFrame(
        {"class": ["class 1", "class 2"], "units": ["a:0", "a:0 a:1"], "reached": [True, False]}
    )
    result.report(
        folder / "report.html",
        attributes=attributes,
        curves=[folder / "one" / "curve.csv", folder / "other" / "curve.csv"],
        minimal_sets=sets,
    )
    return result, folder / "report.html"


def test_classes_without_images_are_folded_away(sparse, open_page):
    _, path = sparse
    page = open_page(path, width=1280)
    assert "200 of 300 classes" in page.locator("#summary .lead").inner_text()
    assert page.locator("#class-table tbody tr").count() == 200
    absent = page.locator("#absent")
    assert absent.locator("summary").inner_text() == "100 classes have no images in the data"
    assert not absent.locator("p").is_visible()
    absent.locator("summary").click()
    assert absent.locator("p").inner_text().startswith("class 0, class 3, class 6")
    page.locator(".heat").focus()
    page.keyboard.press("ArrowRight")
    assert " class 1. drop" in page.locator("#live").inner_text()
    page.keyboard.press("c")
    assert title_of_card(page) == "class 1"
    page.locator("#card .next").click()
    wait_for_card(page, "class 2")
    page.locator("#card .next").click()
    wait_for_card(page, "class 4")


def test_many_classes_share_the_height_and_grow_until_they_can_be_read(sparse, open_page):
    page = open_page(sparse[1], width=1280)
    canvas = page.locator(".heat canvas")
    assert canvas.bounding_box()["height"] < 700  # type: ignore[index]
    for _ in range(6):
        page.locator("#heatmap").get_by_role("button", name="Zoom in").click()
    page.locator(".heat").focus()
    for key in ("ArrowRight", "End", "Shift+ArrowDown"):
        page.keyboard.press(key)
    # The cell under the keys is in view, and the pointer finds the same there.
    spoken = page.locator("#live").inner_text().split(".")[0].strip()
    box = canvas.bounding_box()
    tip = page.locator("#tip").bounding_box()
    assert box is not None
    assert tip is not None
    assert box["y"] - 120 < tip["y"] < box["y"] + box["height"]
    assert page.locator("#tip div").first.inner_text().split(".")[0] == spoken


def test_tables_say_that_they_scroll(sparse, report, open_page):
    page = open_page(sparse[1], width=1280)
    more = page.locator("#classes .more")
    assert more.inner_text() == "Scroll down for all 200 rows."
    assert not page.locator("#units .more").is_visible()
    narrow = open_page(report, width=400)
    assert "sideways" in narrow.locator("#units .more").inner_text()


def test_curves_of_two_files_of_one_name(sparse, open_page):
    page = open_page(sparse[1])
    assert page.locator("#curves h3").all_inner_texts() == ["one/curve.csv", "other/curve.csv"]
    first = page.locator("#curves .part").first
    assert "chance" in first.locator(".legend").inner_text()
    first.get_by_label("Measure").select_option(label="FLOPs of one image")
    assert "FLOPs of one image" in str(first.locator(".chart svg").first.text_content())
    assert "chance" not in first.locator(".legend").inner_text()


def test_a_failed_search_is_no_minimal_set(sparse, open_page):
    page = open_page(sparse[1], "#class/2")
    assert title_of_card(page) == "class 2"
    assert "No minimal set found" in page.locator("#card").inner_text()
    rows = page.locator("#class-table tbody tr").all_inner_texts()
    shown = {row.split("\t")[0]: row.split("\t")[-1] for row in rows}
    assert (shown["class 1"], shown["class 2"], shown["class 4"]) == ("1", "none found", "\u2013")


def test_an_attribute_of_one_outlier_is_drawn_by_its_logarithm(sparse, open_page):
    page = open_page(sparse[1])
    assert "attribute_0, logarithmic" in page.locator("#attributes .points").inner_text()


def test_without_labels_the_page_speaks_of_agreement(result, open_page, tmp_path):
    unlabelled = dataclasses.replace(result, labels=result.baseline, labelled=False)
    unlabelled.report(tmp_path / "report.html")
    page = open_page(tmp_path / "report.html")
    assert "agreement of the intact network" in page.locator("#summary").inner_text()
    shown = [page.locator("body").inner_text()]
    for name in ("#unit-table", "#class-table a"):
        page.locator(f"{name} tbody tr" if name == "#unit-table" else name).first.click()
        title_of_card(page)
        shown.append(page.locator("body").inner_text())
        page.keyboard.press("Escape")
    assert [text for text in shown if "ccuracy" in text] == []
    assert "agreement of the intact network" in shown[2]


def test_estimates_are_shown_with_their_intervals(open_page, tmp_path):
    model, images, labels = networks.network("residual")
    options = {"guarantee": "estimated", "budget": "40%", "progress": False, "audit": 0}
    found = pa.ablate(model, (images, labels), **options)
    found.report(tmp_path / "report.html", attributes=attributes_of(found, 2))
    page = open_page(tmp_path / "report.html")
    assert f"Estimated: {found.estimate}." in page.locator("#summary").inner_text()
    heads = page.locator("#unit-table th").all_inner_texts()
    assert "\u00b1" in heads
    assert "Noise floor" not in heads
    order = np.argsort(-found.max_class_drop, kind="stable")[: len(column(page, 3))]
    widths = found.half_width()[order]
    np.testing.assert_allclose(figures(column(page, 3)), widths, atol=5.1e-5)
    page.locator("#unit-table tbody tr").first.click()
    title_of_card(page)
    card = page.locator("#card").inner_text()
    assert f"\u00b1 {points(widths[0])}, 95 %" in card
    assert "confusion" not in card

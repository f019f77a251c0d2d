"""Take the pictures of docs/guides/report.md from a report; needs playwright and a Chromium."""

# pyablate run demo:vgg_bn --data demo --limit 2000 --output run.zarr
# pyablate attributes demo:vgg_bn --data demo --limit 1000 --output attributes.zarr
# pyablate prune demo:vgg_bn --data demo --limit 500 --by l1 --by run.zarr --csv curve.csv
# pyablate report run.zarr --attributes attributes.zarr --curves curve.csv
#     --model demo:vgg_bn --data demo --limit 2000 --title 'vgg_bn on Fashion-MNIST'
# python examples/report_pictures.py report.html docs/images

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

UNIT = "#unit/features.2%3A18"


def main() -> None:
    """Write report-overview, report-heatmap, report-unit and report-attributes.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("output", type=Path, help="folder for the pictures")
    options = parser.parse_args()
    where = options.report.resolve().as_uri()
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        overview = opened(browser, where)
        overview.screenshot(path=options.output / "report-overview.png")
        heat_map(opened(browser, where), options.output / "report-heatmap.png")
        card = opened(browser, where + UNIT, scheme="dark")
        card.screenshot(path=options.output / "report-unit.png")
        section = opened(browser, where).locator("#attributes")
        section.screenshot(path=options.output / "report-attributes.png")
        browser.close()


def opened(browser: Browser, url: str, *, scheme: str = "light") -> Page:
    """Open a report and wait until it has drawn itself."""
    page = browser.new_page(
        viewport={"width": 1200, "height": 900},
        color_scheme=scheme,  # type: ignore[arg-type]
        reduced_motion="reduce",
    )
    page.goto(url)
    page.wait_for_selector("main[aria-busy=false]")
    page.wait_for_timeout(500)
    return page


def heat_map(page: Page, path: Path) -> None:
    """Sort the heat map and take the section alone."""
    section = page.locator("#heatmap")
    section.get_by_label("Sort units by").select_option("max_class_drop")
    section.get_by_label("Sort classes by").select_option("cluster")
    section.screenshot(path=path)


if __name__ == "__main__":
    main()

"""Take the picture of docs/guides/notebooks.md: a notebook, run and laid out as the site does it.

Needs the extra ``docs``, playwright and a Chromium.
"""

# python examples/notebook_pictures.py docs/images

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image
from playwright.sync_api import sync_playwright
from sphinx.application import Sphinx

CELLS = (
    """
import pyablate as pa

model, images, labels = pa.demo.load("alexnet", limit=200)
data, layer = (images, labels), "features.11"
pa.plan(model, data, layer)
""",
    """
result = pa.ablate(model, data, layer, class_names=pa.demo.CLASSES)
result
""",
    """
pa.cumulative(model, data, layer, order="random", repeats=2, steps=6)
""",
)
CONFIGURATION = """
extensions = ["myst_nb"]
html_theme = "furo"
html_title = "a notebook"
nb_execution_mode = "off"
"""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def main() -> None:
    """Write notebook.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder for the picture")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = laid_out(executed(CELLS), Path(folder))
        take(page, options.output / "notebook.png")


def executed(cells: tuple[str, ...]) -> nbformat.NotebookNode:
    """Run a notebook; what it shows has no control characters, in the saved file neither."""
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_markdown_cell("# A notebook")]
    notebook.cells += [nbformat.v4.new_code_cell(cell.strip()) for cell in cells]
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    done = NotebookClient(notebook).execute()
    for cell in done.cells[1:]:
        for output in cell["outputs"]:
            for text in [output.get("text", ""), *output.get("data", {}).values()]:
                if CONTROL.search(text):
                    raise ValueError(f"control characters in {text[:80]!r}")
    return done


def laid_out(notebook: nbformat.NotebookNode, folder: Path) -> Path:
    """Write the page that the site would show."""
    source = folder / "source"
    source.mkdir()
    (source / "conf.py").write_text(CONFIGURATION)
    nbformat.write(notebook, source / "index.ipynb")
    target = folder / "html"
    Sphinx(source, source, target, folder / "trees", "html", status=None).build()
    return target / "index.html"


def take(page: Path, picture: Path) -> None:
    """Take a picture of the article alone."""
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        shown = browser.new_page(viewport={"width": 1100, "height": 900}, color_scheme="light")
        shown.goto(page.as_uri())
        shown.locator("article").screenshot(path=picture)
        browser.close()
    Image.open(picture).convert("P", palette=Image.Palette.ADAPTIVE, colors=32).save(
        picture, optimize=True
    )


if __name__ == "__main__":
    main()

"""The documents: links lead somewhere, the Python in the README runs, versions agree."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

import pytest
from support.shelled import invoke_apart

import pyablate as pa

_ROOT = Path(__file__).parents[1]
_DOCS = _ROOT / "docs"
_PAGES = sorted(path for path in _DOCS.rglob("*.md") if "_build" not in path.parts)
_DOCUMENTS = [*sorted(_ROOT.glob("*.md")), *_PAGES]


def _anchors(document: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", _DOCUMENTS, ids=lambda path: str(path.relative_to(_ROOT)))
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text())
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path) if path else document
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def _run_page(path: Path, *shorter: tuple[str, str]) -> dict[str, object]:
    """Run the Python of a page, made shorter by replacements; return the names it defines."""
    code = "".join(re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL))
    for old, new in shorter:
        assert old in code
        code = code.replace(old, new)
    names: dict[str, object] = {}
    exec(compile(code, path.name, "exec"), names)
    return names


@pytest.mark.slow
def test_python_in_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _run_page(_ROOT / "README.md", ("limit=1000", "limit=100"))  # so that the test is short
    saved = pa.load("run.zarr")
    assert len(saved.labels) == 100
    assert len(saved.units) > 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "shorter", "defined"),
    [
        (
            "statistics.md",
            {"limit=500": "limit=100", "clusters=6)": "clusters=3)"},
            "finer tests table floor honest found units broken",
        ),
        ("attributes.md", {"limit=500": "limit=100"}, "table best"),
        ("your-model.md", {}, "result comparison missed texts found"),
        ("guarantees.md", {"limit=200": "limit=60"}, "screened exact differ"),
        (
            "experiments.md",
            {"limit=500": "limit=120"},
            "curves both sets worth best along control table",
        ),
        (
            "related-systems.md",
            {"limit=200": "limit=60"},
            "contrast graph unified low both needed sets region pruned sparse",
        ),
        (
            "compression.md",
            {"limit=500": "limit=60"},
            "measured smaller curves table comparison scores",
        ),
    ],
)
def test_python_in_a_page_runs(page, shorter, defined, tmp_path, monkeypatch):
    if page in ("compression.md", "related-systems.md", "your-model.md"):
        pytest.importorskip("torch_pruning")
    monkeypatch.chdir(tmp_path)
    assert set(defined.split()) <= set(_run_page(_DOCS / "guides" / page, *shorter.items()))
    assert page != "compression.md" or (tmp_path / "sensitivity.csv").exists()


_BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    ["tutorials/start.md", "guides/your-data.md", "guides/layers.md", "explanation/exactness.md"],
)
def test_a_page_prints_what_it_says(page, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    found = _BLOCK.findall((_DOCS / page).read_text())
    assert any(expected for _, expected in found)
    for code, expected in found:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, page, "exec"), names)
        assert printed.getvalue() == expected


_WALKED = re.compile(r"```(python|console)\n(.*?)```", flags=re.DOTALL)
_COMMAND = re.compile(r"^\$ pyablate ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", flags=re.MULTILINE)
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")


def _told(text: str) -> list[list[str]]:
    """Words of each line that is not empty, without times and rules."""
    text = re.sub(r"\d[\d.,]* (?:s|min)\b", "- s", text).replace("─", "")
    return [words for words in map(str.split, text.splitlines()) if words]


def _numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in _NUMBER.findall(text)]


def _must_agree(printed: str, expected: str, trained: bool) -> None:
    """Compare what a command prints; behind a training rows change places, and accuracies a bit."""
    found, told = ([" ".join(words) for words in _told(text)] for text in (printed, expected))
    if not trained:
        assert found == told
        return
    assert sorted(_NUMBER.sub("#", line) for line in found) == sorted(
        _NUMBER.sub("#", line) for line in told
    )
    for line, other in zip(*(_of_accuracy(lines) for lines in (found, told)), strict=True):
        assert _numbers(line) == pytest.approx(_numbers(other), abs=6)


def _of_accuracy(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("accuracy, %")]


@pytest.mark.slow
def test_the_walk_of_a_new_user_prints_what_the_page_says(tmp_path, monkeypatch):
    """Own network and folder of images, in the shell, then pruned and fine-tuned."""
    pytest.importorskip("torch_pruning")
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for module in ("my_network", "small"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    names: dict[str, object] = {}
    trained, commands = False, 0
    for kind, block in _WALKED.findall((_DOCS / "tutorials" / "your-own-network.md").read_text()):
        if kind == "python":
            exec(compile(block, "your-own-network.md", "exec"), names)
            continue
        for words, expected in _COMMAND.findall(block):
            code, printed, errors = invoke_apart(*shlex.split(words.replace("\\\n", " ")))
            assert code == 0, errors
            trained = trained or words.startswith("finetune")
            _must_agree(printed, expected, trained)
            commands += 1
    assert commands >= 7
    assert trained


def test_the_comparison_of_printed_pages_can_fail():
    _must_agree(" Time: 3.1 s\n\n a  1.5 ", "Time: 28.0 s\na 1.5\n", trained=False)
    _must_agree("accuracy, % 90.00\nb 1\na 2e-05", "accuracy, % 91.5\na 1\nb 2", trained=True)
    for printed, expected, trained in (
        ("a 1.5", "a 1.6", False),
        ("a 1.5\nb", "a 1.5", False),
        ("a 90", "b 90", True),
        ("accuracy, % 90", "accuracy, % 70", True),
    ):
        with pytest.raises(AssertionError):
            _must_agree(printed, expected, trained)


@pytest.mark.slow
def test_python_in_the_gallery_runs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    _run_page(_DOCS / "guides" / "gallery.md", ("limit=300", "limit=60"))
    assert (tmp_path / "both.png").exists()


def test_every_public_name_is_in_the_reference():
    text = "".join(path.read_text() for path in (_DOCS / "reference").glob("*.md"))
    modules = set(".".join(re.findall(r"auto\w+:: pyablate\.([\w.]+)", text)).split("."))
    named = r"(?:auto(?:function|class|exception)|py:data):: (\w+)"
    documented = modules | set(re.findall(named, text))
    assert set(pa.__all__) - documented == set()
    compression = set(re.findall(r"(?:attribution|comparison|compression)\.(\w+)", text))
    assert set(pa.compression.__all__) - set(pa.__all__) - compression == set()


def _contents(page: Path) -> set[Path]:
    """Pages in the tables of contents of a page, and of the pages in them."""
    blocks = re.findall(r"```{toctree}\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line]
    names = [page.parent / line for line in lines if not line.startswith(":")]
    below = {name.with_name(f"{name.name}.md") for name in names}
    return below.union(*(_contents(found) for found in below if found.exists()))


def test_every_page_is_in_the_contents() -> None:
    """A page that no table of contents has is not found by anyone."""
    notebooks = [path.with_suffix(".md") for path in (_DOCS / "tutorials").glob("*.ipynb")]
    assert {*_PAGES, *notebooks} - {_DOCS / "index.md"} == _contents(_DOCS / "index.md")


def test_versions_agree():
    project = re.search(r'^version = "(.+)"', (_ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    citation = re.search(r"^version: (.+)$", (_ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert project is not None
    assert citation is not None
    cited = re.search(r"version = {(.+)}", (_DOCS / "reference" / "cite.md").read_text())
    assert cited is not None
    # A wheel with CUDA kernels carries their toolkit behind a plus.
    installed = pa.build_info()["version"].partition("+")[0]
    assert project[1] == citation[1] == cited[1] == installed

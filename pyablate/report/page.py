"""One HTML file from the numbers and the files in ``assets``; it allows itself no network."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib import resources
from typing import Any

SCRIPTS = (
    "dom.js",
    "unpack.js",
    "format.js",
    "points.js",
    "layers.js",
    "heatmap.js",
    "units.js",
    "cards.js",
    "attributes.js",
    "curves.js",
    "main.js",
)
"""The page's own scripts, in the order in which they build on one another."""

LIBRARIES = ("vendor/d3.min.js", "vendor/plot.umd.min.js")


def page(contents: dict[str, Any]) -> str:
    """Make the HTML document, ASCII only, from the values of :mod:`pyablate.report.numbers`.

    The scripts are allowed by their hashes and nothing else is: no further script, no request, no
    form (a Content-Security-Policy in the page itself). Names reach the page as JSON and are set as
    text, so none of them can become markup.
    """
    libraries = [_in_script(_asset(name)) for name in LIBRARIES]
    own = "\n".join(_asset(f"js/{name}") for name in SCRIPTS)
    scripts = [*libraries, _in_script(f'(() => {{\n"use strict";\n{own}}})();\n')]
    filled = {
        "policy": _policy(scripts),
        "title": html.escape(str(contents["title"])),
        "style": _asset("report.css"),
        "data": _json(contents),
        "licences": html.escape(_asset("vendor/LICENSES.txt")),
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
    }
    # One pass over the template: what is filled in is not looked at again.
    pieces = _asset("report.html").split("{{")
    out = [pieces[0]]
    for piece in pieces[1:]:
        name, rest = piece.split("}}", 1)
        out += [filled[name.strip()], rest]
    return "".join(out).encode("ascii", "xmlcharrefreplace").decode("ascii")


def _asset(name: str) -> str:
    return (resources.files("pyablate.report") / "assets" / name).read_text("utf-8")


def _json(contents: dict[str, Any]) -> str:
    """Write JSON that holds no ``<``, so that no name can end the script element around it."""
    text = json.dumps(contents, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _in_script(text: str) -> str:
    """Keep a script from ending its element or having its characters replaced."""
    escaped = "".join(c if c.isascii() else _escape(c) for c in text)
    return escaped.replace("</script", "<\\/script").replace("<!--", "\\u003c!--")


def _escape(character: str) -> str:
    units = character.encode("utf-16-be")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def _policy(scripts: list[str]) -> str:
    allowed = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode('ascii')).digest()).decode()}'"
        for script in scripts
    )
    # Styles are inline because the chart library sets them; they cannot load anything either.
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )

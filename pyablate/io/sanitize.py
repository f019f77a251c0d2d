"""Sanitised text: control characters in names of layers and classes are escaped."""

from __future__ import annotations

import re

# Control characters, separators of lines, what turns the direction of writing, and halves of
# surrogate pairs, which stand for the bytes of a file name that is not valid Unicode.
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str, *, keep: str = "") -> str:
    r"""Write what cannot be seen as Python would: ``\x1b``, ``\n``, ``\udcff``; ``keep`` stays."""

    def shown(found: re.Match[str]) -> str:
        character = found[0]
        return character if character in keep else character.encode("unicode_escape").decode()

    return _UNSEEN.sub(shown, text)

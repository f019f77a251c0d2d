"""Which output of a network a class name stands for: lists of classes as people have them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pyablate._validation import by_number, nearest

IMAGENET = "imagenet"
MAX_BYTES = 64 << 20
"""Limit of a file of classes."""

_WORDNET = re.compile(r"(n\d{8})(?:\s+(.*))?")


@dataclass(frozen=True)
class ClassMap:
    """The outputs of a network, each under all its names.

    Attributes
    ----------
    outputs : tuple of tuple of str
        Names of each output: WordNet id, class name, synonyms; the one to show first.
    """

    outputs: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """One name per output."""
        return tuple(names[0] for names in self.outputs)

    def find(self, name: str) -> int | None:
        """Output that a name stands for, letter case and punctuation apart, or a number; or None.

        Raises
        ------
        ValueError
            The name stands for several.
        """
        key = _plain(name)
        found = self._by_name.get(key, [])
        # Some synonym may be shared; then the one that is called so in the first place is meant.
        first = [n for n in found if _plain(self.outputs[n][0]) == key] if len(found) > 1 else []
        found = first or found
        if len(found) > 1:
            outputs = ", ".join(map(str, found[:5]))
            raise ValueError(
                f"classes: {name!r} stands for the outputs {outputs}; use WordNet ids or numbers"
            )
        if found:
            return found[0]
        number = int(name) if name.isascii() and name.isdecimal() and len(name) < 10 else None
        return number if number is not None and number < len(self.outputs) else None

    def match(self, names: Sequence[str]) -> list[int]:
        """Output of each name.

        Raises
        ------
        ValueError
            Names that stand for none, or for several outputs.
        """
        found = [self.find(name) for name in names]
        unknown = [name for name, output in zip(names, found, strict=True) if output is None]
        if unknown:
            several = ", ".join(map(repr, unknown[:3])) + (" ..." if len(unknown) > 3 else "")
            near = nearest(unknown[0], [name for names in self.outputs for name in names])
            raise ValueError(
                f"classes: {len(unknown)} of {len(names)} folders are none of the "
                f"{len(self.outputs)} classes: {several}{near}"
            )
        return [output for output in found if output is not None]

    @cached_property
    def _by_name(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for number, names in enumerate(self.outputs):
            for key in {_plain(name) for name in names}:
                found.setdefault(key, []).append(number)
        return found


def class_map(given: Any) -> ClassMap:
    """Understand a list of classes.

    Parameters
    ----------
    given : path, mapping or sequence
        Names in the order of the outputs, as a list, a text file (one a line) or a JSON file; or a
        mapping or JSON object of number to name (``id2label``, also inside a ``config.json``), of
        number to names (``{"0": ["n01440764", "tench"]}``, the ``imagenet_class_index.json`` of
        Keras and torchvision), or of name to number. ``"imagenet"`` takes the 1,000 classes from
        timm (WordNet ids and names) or torchvision (names), where one is installed.

    Raises
    ------
    ValueError, TypeError
        None of these, an output without a name, or a file that cannot be read.
    OSError
        No such file.
    ImportError
        ``"imagenet"`` without either library.
    """
    if isinstance(given, ClassMap):
        return given
    if given == IMAGENET:
        return _imagenet()
    if isinstance(given, str | os.PathLike):
        given = _read(Path(given))
    if isinstance(given, Mapping) and isinstance(given.get("id2label"), Mapping):
        given = given["id2label"]
    if isinstance(given, Mapping):
        entries = _of_mapping(given)
    elif isinstance(given, Sequence):
        entries = list(given)
    else:
        raise TypeError(
            f"classes: expected a file, a list of names or a mapping, got {type(given).__name__}"
        )
    if not entries:
        raise ValueError("classes: expected at least one class, found none")
    return ClassMap(tuple(_names(entry) for entry in entries))


def _of_mapping(given: Mapping[Any, Any]) -> list[Any]:
    """Entries in the order of the outputs, of numbers to names or of names to numbers."""
    if given and all(isinstance(n, int) and not isinstance(n, bool) for n in given.values()):
        outputs: dict[int, list[str]] = {}
        for name, number in given.items():
            outputs.setdefault(number, []).append(str(name))
        return by_number("classes", outputs)
    return by_number("classes", given)


def _names(entry: Any) -> tuple[str, ...]:
    """Names of one output, the one to show first."""
    parts = [entry] if isinstance(entry, str) else entry
    if not isinstance(parts, Sequence) or not parts or not all(isinstance(p, str) for p in parts):
        raise ValueError(f"classes: expected a name or a list of names for each, got {entry!r}")
    ids, names = [], []
    for part in map(str.strip, parts):
        wordnet = _WORDNET.fullmatch(part)
        if wordnet is None:
            names.append(part)
        else:
            ids.append(wordnet[1])
            names += [wordnet[2]] if wordnet[2] else []
    synonyms = [word.strip() for name in names for word in name.split(",")]
    return tuple(dict.fromkeys([*names, *ids, *synonyms]))


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name).strip().casefold()


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(
            f"classes: expected {IMAGENET!r} or a file, found none at {str(path)!r}"
        )
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"classes: {str(path)!r} has more than {MAX_BYTES} bytes")
    try:
        text = path.read_text(encoding="utf-8-sig")
        return json.loads(text) if path.suffix == ".json" else _lines(text)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"classes: cannot read {str(path)!r} ({error})") from None


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _imagenet() -> ClassMap:
    """Take ImageNet's 1,000 classes from what is installed; timm is read without importing it."""
    timm = importlib.util.find_spec("timm")
    for place in timm.submodule_search_locations or () if timm else ():
        folder = Path(place) / "data" / "_info"
        if (folder / "imagenet_synsets.txt").is_file():
            return _of_timm(folder)
    try:
        weights = importlib.import_module("torchvision.models").ResNet18_Weights
    except ImportError:
        raise ImportError(
            f"classes: {IMAGENET!r} takes the names from timm or torchvision, neither can be "
            "imported: pip install timm, or give a file such as imagenet_class_index.json"
        ) from None
    return class_map(list(weights.DEFAULT.meta["categories"]))


def _of_timm(folder: Path) -> ClassMap:
    ids = _lines((folder / "imagenet_synsets.txt").read_text(encoding="utf-8"))
    lemmas = folder / "imagenet_synset_to_lemma.txt"
    lines: Iterable[str] = _lines(lemmas.read_text(encoding="utf-8")) if lemmas.is_file() else ()
    names = {line[:9]: line for line in lines}
    return class_map([names.get(wordnet, wordnet) for wordnet in ids])

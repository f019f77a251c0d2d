"""Security check of exported programs (``.pt2``) before torch reads them.

``torch.export.load`` trusts its file. It unpickles members that a flag of the archive marks as
pickled, loads compiled libraries, evaluates the text of symbolic sizes as Python, imports modules
that the structure of inputs names, and looks operators up by any path below ``torch``. All of that
stands in the names of the members and in their JSON, so it can be refused beforehand.
"""

from __future__ import annotations

import ast
import json
import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_JSON = 256 << 20
"""Bytes of a member that describes the graph; those of the largest networks have some 20 MB."""

_OBJECTS = re.compile(r"(^|/)data/constants/(custom|opaque)_obj_")
_COMPILED = re.compile(r"(^|/)data/aotinductor/|\.(so|dll|dylib|pyd)$")
_TARGET = re.compile(
    r"torch\.ops\.(aten|prims|pyablate|torchvision|quantized|quantized_decomposed)"
    r"\.([a-zA-Z]\w*|_[a-z]\w*|__i?(and|or|xor|lshift|rshift)__)(\.[a-zA-Z]\w*)?"
    r"|torch\.ops\.higher_order\.(cond|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|_operator\.[a-z]\w*|math\.[a-z]\w*|torch\.sym_\w+"
)
_FILES = re.compile(r"torch\.ops\.aten\.from_file\b")  # maps files, and makes them
_CONTAINERS = (None, *(f"builtins.{name}" for name in ("tuple", "list", "dict")))
_TEXT = re.compile(r"[\w.+-]*")
_SYMPY = frozenset(
    "Abs Add And Equality Float FloorDiv GreaterThan Integer LessThan Max Min Mod Mul Ne Not Or "
    "Pow Rational StrictGreaterThan StrictLessThan Symbol Unequality CeilDiv CeilToInt CleanDiv "
    "FloatPow FloatTrueDiv FloorToInt Identity IntTrueDiv IsNonOverlappingAndDenseIndicator "
    "ModularIndexing PowByNatural PythonMod RoundDecimal RoundToInt ToFloat TruncToFloat "
    "TruncToInt Where Eq Ge Gt Le Lt ceiling floor".split()
)
_POWERS = ("Pow", "PowByNatural", "FloatPow")
_EXPRESSIONS = (
    *(ast.Expression, ast.Call, ast.Name, ast.Load, ast.keyword, ast.Constant),
    *(ast.BinOp, ast.UnaryOp, ast.Compare, ast.operator, ast.unaryop, ast.cmpop),
)


def check_archive(path: Path, *, max_bytes: int) -> None:
    """Refuse an archive whose reading could do anything but make tensors and a graph.

    So may be none of pickled objects, compiled code, text that is no size, operators that are not
    torch's, and more than ``max_bytes`` of unpacked members or of tensors.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        for member in members:
            if _OBJECTS.search(member.filename):
                raise ValueError(
                    f"model: {str(path)!r} holds pickled objects, expected tensors only"
                )
            if _COMPILED.search(member.filename):
                raise ValueError(
                    f"model: {str(path)!r} holds compiled code ({member.filename}), {_WANTED}"
                )
        unpacked = sum(member.file_size for member in members)
        _check_size(path, unpacked, max_bytes)
        for member in members:
            if member.filename.endswith(".json"):
                _check_size(path, member.file_size, MAX_JSON)
                content = json.loads(archive.read(member))
                _check_size(path, _declared_bytes(content), max_bytes)
                for key, value in _entries(content):
                    _check_entry(path, key, value)


_WANTED = "expected tensors and a graph of torch's operators"


def _check_size(path: Path, size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(f"model: {str(path)!r} unpacks to {size} bytes, the limit is {limit}")


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    waiting = [content]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield from item.items()
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item


def _check_entry(path: Path, key: str, value: Any) -> None:
    if key == "use_pickle" and value:
        raise ValueError(f"model: {str(path)!r} holds pickled objects, expected tensors only")
    if key == "expr_str" and not _is_size(value):
        raise ValueError(f"model: {str(path)!r} holds {_short(value)} where a size was expected")
    if key in ("in_spec", "out_spec") and not _is_structure(value):
        raise ValueError(
            f"model: {str(path)!r} takes or returns {_short(value)}, expected one tensor each"
        )
    called = key == "target" and isinstance(value, str)
    if called and (not _TARGET.fullmatch(value) or _FILES.match(value)):
        raise ValueError(
            f"model: {str(path)!r} calls {_short(value)}, expected operators such as "
            "torch.ops.aten.relu; a network with others can be loaded as module:factory"
        )


def _is_size(text: Any) -> bool:
    """Whether a text is arithmetic of numbers and symbols, since sympy evaluates it as Python."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        return False
    for node in ast.walk(tree):
        if not isinstance(node, _EXPRESSIONS):
            return False
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) not in _SYMPY:
            return False
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and not _TEXT.fullmatch(text):
            return False
        if _is_power_of_numbers(node):  # which could take for ever
            return False
    return True


def _is_power_of_numbers(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        base: ast.AST = node.left
    elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in _POWERS:
        base = node.args[0] if node.args else node
    else:
        return False
    names = [inner.id for inner in ast.walk(base) if isinstance(inner, ast.Name)]
    return not any(name == "Symbol" or name not in _SYMPY for name in names)


def _is_structure(text: Any) -> bool:
    """Whether the structure of inputs or outputs names plain containers only."""
    try:
        content = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return bool(text == "")
    entries = list(_entries(content))
    plain = all(value in _CONTAINERS for key, value in entries if key == "type")
    contexts = [value for key, value in entries if key == "context"]
    return plain and not any("__enum__" in str(context) for context in contexts)


def _declared_bytes(content: Any) -> int:
    """Bytes that all tensors of the archive would have, at 8 an element at most."""
    total = 0
    for key, value in _entries(content):
        if key == "tensor_meta" and isinstance(value, dict):
            sizes = [
                size.get("as_int") for size in value.get("sizes", []) if isinstance(size, dict)
            ]
            total += 8 * math.prod(size for size in sizes if isinstance(size, int))
    return total


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

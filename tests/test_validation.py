"""Checks of arguments: what they let through, and what their errors say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pyablate import _validation as v


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: v.check_choice("kind", "blur", ("blue", "red")), "kind: .* one of blue, red, .*"),
        (lambda: v.check_choices("kinds", ["red", "rad"], ("blue", "red")), "'rad'; nearest: red"),
        (lambda: v.check_count("steps", 0), "steps: expected at least 1, got 0"),
        (
            lambda: v.check_count("steps", True),
            "steps: expected an integer of at least 1, got True",
        ),
        (lambda: v.check_count("steps", 2.0), "steps: expected an integer of at least 1, got 2.0"),
        (lambda: v.check_seed(-1), "seed: expected at least 0, got -1"),
        (lambda: v.check_level("fdr", 1), "fdr: expected a number between 0 and 1, got 1"),
        (lambda: v.check_level("fdr", float("nan")), "fdr: .* got nan"),
        (lambda: v.check_fraction("fraction", 1.01), "fraction: .* from 0 to 1, got 1.01"),
        (lambda: v.check_names("class_names", ["a"], 2), "class_names: expected 2 names, got 1"),
    ],
)
def test_errors_name_the_argument_and_what_came(check: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check()


def test_what_is_right_passes() -> None:
    v.check_count("steps", np.int64(1))
    v.check_count("warmup", 0, 0)
    v.check_fraction("fraction", 0)
    v.check_fraction("fraction", 1)
    assert v.check_choices("kinds", "red", ("blue", "red")) == ["red"]
    assert v.check_names("class_names", None, 2) == ("0", "1")
    assert v.check_names("class_names", [1, "b"], 2) == ("1", "b")  # type: ignore[list-item]


def test_one_text_is_no_sequence_of_names() -> None:
    with pytest.raises(TypeError, match="class_names: expected a sequence of strings, got 'ab'"):
        v.check_names("class_names", "ab", 2)


def test_the_nearest_come_first_and_else_the_first_known() -> None:
    assert v.nearest("ref", ["blue", "red", "green"], 1) == "; nearest: red"
    assert v.nearest("xyz", map(str, range(9))) == "; nearest: 0, 1, 2, 3, 4"
    assert v.nearest("xyz", []) == ""


def test_the_first_line_of_an_error_or_its_type() -> None:
    assert v.first_line(ValueError("\n one \n two")) == "one"
    assert v.first_line(AssertionError()) == "AssertionError"

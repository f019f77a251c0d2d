"""What notebooks show: every object with figures as a page with tables, what is left out said."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from support.simulated import simulate
from torch import nn

import pyablate as pa
from pyablate.results.notebook import page


def test_what_is_left_out_is_said_and_text_is_escaped():
    found = page("a < b", pd.DataFrame({"x": range(12), "y": [0.123456] * 12}), notes=["c & d"])
    assert "<p>a &lt; b</p>" in found
    assert "<td>9</td>" in found
    assert "<td>10</td>" not in found
    assert "10 of 12 rows" in found
    assert "0.1235" in found
    assert found.endswith("<p>c &amp; d</p>")
    assert page("a", notes=["b:", "  c"]) == "<p>a</p>\n<p>b:<br>&emsp;c</p>"
    assert page("a") == "<p>a</p>"


def test_a_result_shows_its_worst_units():
    draw = np.random.default_rng(0)
    result = simulate(np.full((3, 2), 0.5), 0.5, 4, draw, ["x<1>"] * 3)
    found = result._repr_html_()
    assert "max_class_drop" in found
    assert "x&lt;1&gt;" in found
    assert "3 units" in found
    assert "Audit: none" in found or "Audit: " in found


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    return model, (torch.randn(30, 6), torch.arange(30) % 3)


MADE = {
    "plan": (lambda m, d: pa.plan(m, d), "Plan for 30 images"),
    "cumulative": (lambda m, d: pa.cumulative(m, d, "1", order="random"), "curves"),
    "pairs": (lambda m, d: pa.pairs(m, d, "1"), "6 pairs"),
    "minimal sets": (lambda m, d: pa.minimal_sets(m, d, "1"), "MinimalSets"),
    "comparison": (lambda m, d: pa.compare(m, m, d), "0 of 30 predictions differ"),
    "shapley": (lambda m, d: pa.shapley(m, d, ["1:0", "1:1"], permutations=20), "Shapley(2 units"),
    "rotation": (lambda m, d: pa.rotation_control(m, d, "1"), "RotationControl"),
}


@pytest.mark.parametrize("name", MADE)
def test_objects_with_figures_are_pages(case, name):
    make, text = MADE[name]
    made = make(*case)
    found = made._repr_html_()
    assert text in found
    assert "<table" in found
    assert "\x1b" not in found
    assert len(repr(made)) < 2000

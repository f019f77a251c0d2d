"""Sums of lazy deltas: what is pending on either side, or on both."""

import pytest
import torch
from support.oracle import check
from torch import nn

pytestmark = pytest.mark.usefixtures("exports_kept")

SUMS = {
    "shortcut second": lambda stem, branch: branch + stem,
    "shortcut first": lambda stem, branch: stem + branch,
    "subtracted": lambda stem, branch: stem - branch,
    "twice": lambda stem, branch: branch + branch,
    "broadcast": lambda stem, branch: branch + stem.mean(dim=(2, 3), keepdim=True),
}


class AroundSum(nn.Module):
    """A first convolution, a shortcut that stands still or changes as well, and what reads both."""

    def __init__(self, order):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.conv, self.relu = nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()
        self.last, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 5)
        self.order = order

    def forward(self, x):
        stem = self.stem(x)
        both = SUMS[self.order](stem, self.conv(self.inner(stem)))
        return self.head((self.last(self.relu(both)) + both).relu().mean((2, 3)))


@pytest.mark.parametrize("order", SUMS)
@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_sums_of_what_is_pending(order, precision):
    """Units of the stem change both summands, those of the branch one of them."""
    model = AroundSum(order).eval()
    model.known_as = order
    torch.manual_seed(1)
    data = torch.randn(12, 1, 9, 9), torch.arange(12) % 5
    check(model, data, ["stem.1", "inner.1", "relu"], precision=precision)

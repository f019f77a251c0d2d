"""Games as tables of what is lost without each set of units, and their exact Shapley values."""

from __future__ import annotations

import math

import numpy as np


class Game:
    """``table[bits]`` is lost without the units whose bits are set; counts what it is asked."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = np.asarray(table, dtype=np.float64)
        self.units = len(self.table).bit_length() - 1
        self.asked = 0

    def __call__(self, ranks: np.ndarray, order: np.ndarray, count: np.ndarray) -> np.ndarray:
        self.asked += len(count)
        sets = ranks[order] < count[:, None]
        return self.table[sets @ (1 << np.arange(self.units))]


def shapley_values(game: Game) -> np.ndarray:
    """Sum over all sets S without a unit of |S|! (n - |S| - 1)! / n! times what it adds to S."""
    n = game.units
    values = np.zeros(n)
    for unit in range(n):
        for bits in range(2**n):
            if not bits >> unit & 1:
                size = bits.bit_count()
                weight = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
                values[unit] += weight * (game.table[bits | 1 << unit] - game.table[bits])
    return values

"""The oracle: a plain float64 hook loop, and the comparison of results with it."""

from pyablate.network.near_tie import NEAR_TIE
from pyablate.reference.agreement import Agreement, compare
from pyablate.reference.loop import ablate, logits, near_ties, predictions

__all__ = ["NEAR_TIE", "Agreement", "ablate", "compare", "logits", "near_ties", "predictions"]

"""How a run checked itself. Nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Audit:
    """How a run checked itself: random pairs recomputed by plain forward passes of the model.

    Attributes
    ----------
    pairs : int
        (unit, image) pairs recomputed, in float32, and in float64 where float32 does not settle
        them or differs.
    mismatches : int
        Pairs whose recomputed prediction differed, near ties apart.
    mended : int
        Pairs that differed at first: their layers were computed again more carefully, which
        ``strategy`` tells, and they agreed.

    Examples
    --------
    >>> result.audit.pairs, result.audit.mismatches
    (30, 0)
    """

    pairs: int
    mismatches: int
    mended: int = 0

    def __add__(self, other: Audit) -> Audit:
        """Audit of the pairs of both."""
        return Audit(
            self.pairs + other.pairs,
            self.mismatches + other.mismatches,
            self.mended + other.mended,
        )

    @property
    def upper_bound(self) -> float:
        """Largest share of wrong pairs in the run that the audit leaves plausible at 95 %.

        One-sided Clopper-Pearson bound; 1 if nothing was audited.
        """
        if self.mismatches >= self.pairs:
            return 1.0
        return float(stats.beta.ppf(0.95, self.mismatches + 1, self.pairs - self.mismatches))

    def __str__(self) -> str:
        """One line for people."""
        mended = f"; {self.mended:,} differed at first and were mended" if self.mended else ""
        return (
            f"{self.pairs:,} pairs recomputed by replay, {self.mismatches} mismatches "
            f"(95 % upper bound {self.upper_bound:.2%} of all pairs){mended}"
        )

"""The page and the picture about pairs of units, made from what sets_study.py found."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from compression_page import _markdown, pyplot
from numpy.typing import NDArray
from scipy.cluster import hierarchy
from sets_statistics import CLUSTERS, LEVEL, Comparison, clusters, square

from pyablate.analysis.clusters import _tree
from pyablate.analysis.statistics import adjusted

if TYPE_CHECKING:
    from sets_study import Found, Reading

WELL, WEAK = 0.5, 0.3
BEYOND = "loss beyond added logits"
SCALE = {
    "accuracy": (100, 2, "points"),
    "loss": (1000, 2, "thousandths of a nat"),
    BEYOND: (1000, 2, "thousandths of a nat"),
}
OF_DAMAGE = ("class drops", "class losses")
OTHERS = ("activations", "incoming filters", "outgoing filters")


def together(low: float, high: float) -> str:
    """Tell the sign of the mean synergy by its interval."""
    if low > 0:
        return "back each other up"
    return "do less together than apart" if high < 0 else "do neither"


def repeats(low: float) -> str:
    """Tell whether synergies of one half are found on the other."""
    return "repeat well" if low >= WELL else "repeat in part" if low > 0 else "do not repeat"


def exceeds(counted: int, tossed: NDArray[np.int64]) -> str:
    """Tell whether more pairs are significant than with tossed signs."""
    return "more than" if counted > np.quantile(tossed, 0.975) else "no more than"


def origin(low: float, low_beyond: float) -> str:
    """Tell where synergies by loss that repeat come from, by the lower ends of two intervals."""
    if not low > 0:  # as where there is nothing to correlate
        return "no synergy by loss repeats on other images"
    if not low_beyond > 0:
        return "what repeats of the synergy by loss is not told from the curvature of the loss"
    return "part of what repeats of the synergy by loss is more than the curvature of the loss"


def alike(r: float, q: float) -> str:
    """Tell whether two ways to compare units agree on which pairs are close."""
    if q > LEVEL:
        return "not seen"
    return ("weakly " if abs(r) < WEAK else "") + ("alike" if r > 0 else "opposite")


def adjusted_over(comparisons: list[Comparison], figure: str) -> dict[tuple[str, str], float]:
    """Return q of a figure, Benjamini-Hochberg over all comparisons of two different ways."""
    other = [each for each in comparisons if each.one != each.other]
    q = adjusted(np.array([getattr(each, figure)[1] for each in other]))
    return {(each.one, each.other): float(value) for each, value in zip(other, q, strict=True)}


def between(low: float, high: float, digits: int) -> str:
    """Write an interval."""
    return f"{low:.{digits}f} to {high:.{digits}f}"


def _repetition(reading: Reading) -> str:
    r, low, high = reading.repeat
    if math.isnan(r):
        return "on one half of the images the synergies of all pairs are equal"
    return (
        f"the synergies of one half of the images **{repeats(low)}** on the other "
        f"(rank correlation {r:.2f}, {between(low, high, 2)})"
    )


def verdicts(found: Found) -> list[str]:
    """Return the sentences that the page begins with, one for each question."""
    predictions = found.screened.units.shape[0] * found.images
    total = found.screened.screening
    share = total.computed / total.pairs if total is not None and total.pairs else 1.0
    lines = [
        f"- Screened and exact: **{found.other_predictions:,} of {predictions:,}** predictions "
        f"differ, and the synergy of {found.other_pairs:,} of {len(found.signs):,} pairs; "
        f"{100 * share:.1f} % of the predictions were computed, the others settled."
    ]
    for name, reading in found.readings.items():
        scale, digits, unit = SCALE[name]
        value, low, high = (scale * number for number in reading.mean)
        lines.append(
            f"- By {name}: in the mean over all pairs two units **{together(low, high)}** "
            f"({value:+.{digits}f} {unit}, {between(low, high, digits)}); {_repetition(reading)}."
        )
    lows = (found.readings[name].repeat[1] for name in ("loss", BEYOND))
    lines.append(f"- Where it comes from: **{origin(*lows)}**.")
    tested = int((found.signs["p"] <= LEVEL).sum())
    kept = found.signs[found.signs["q"] <= LEVEL]
    more = int((kept["more"] > kept["less"]).sum())
    low, high = np.quantile(found.tossed, [0.025, 0.975])
    lines.append(
        f"- Noise of {found.images:,} images: {tested:,} pairs have p at most {LEVEL:g}, "
        f"**{exceeds(tested, found.tossed)}** with tossed signs ({found.tossed.mean():.0f}, "
        f"{between(low, high, 0)}); adjusted over all pairs {len(kept):,} are left, "
        f"{more:,} of them with more harm together."
    )
    strongest = found.strongest
    reading = found.readings[found.best]
    scale, digits, unit = SCALE[found.best]
    positive = int((strongest["measured"] > 0).sum())
    chosen, again = (scale * strongest[column].mean() for column in ("chosen", "measured"))
    lines.append(
        f"- The {len(strongest)} strongest pairs of one half, by {found.best}: **{positive}** are "
        f"positive on the other; their mean falls from {chosen:.{digits}f} to {again:.{digits}f} "
        f"{unit} (all pairs there: {scale * reading.halves[1].mean():.{digits}f})."
    )
    return lines + _of_ways(found)


def _of_ways(found: Found) -> list[str]:
    q, rand_q = (adjusted_over(found.comparisons, name) for name in ("centred", "rand"))
    by_names = {(each.one, each.other): each for each in found.comparisons}

    def told(one: str, other: str) -> str:
        r = by_names[one, other].centred[0]
        return f"{other} **{alike(r, q[one, other])}** ({r:.2f}, q {q[one, other]:.3f})"

    def itself(name: str) -> float:
        return by_names[name, name].centred[0]

    synergy = f"synergy, {found.best}"
    lines = [
        f"- Pairs that back each other up, by {reading} (with itself on other images "
        f"{itself(f'synergy, {reading}'):.2f}), against pairs of like "
        + "; ".join(told(f"synergy, {reading}", other) for other in (*OF_DAMAGE, *OTHERS))
        + "."
        for reading in (found.best, BEYOND)
    ]
    lines += [
        f"- Pairs of like {one} (with itself {itself(one):.2f}) against pairs of like "
        + "; ".join(told(one, other) for other in OTHERS)
        + "."
        for one in OF_DAMAGE
    ]
    asked = [(synergy, other) for other in (*OF_DAMAGE, *OTHERS)]
    asked += [(one, other) for one in OF_DAMAGE for other in OTHERS]
    shared = [
        f"{one} with {other} ({by_names[one, other].rand[0]:.2f})"
        for one, other in asked
        if rand_q[one, other] <= LEVEL
    ]
    lines.append(
        f"- Clusters that share more than chance: **{len(shared)}** of the {len(asked)} "
        f"comparisons above{': ' if shared else ''}{'; '.join(shared)}."
    )
    return lines


def write(found: Found, page: Path) -> None:
    """Write the page and, into ``images`` beside it, its picture."""
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    draw(found, images / "sets.png")
    scale, digits, unit = SCALE[found.best]
    lines = []
    for row in found.strongest.to_dict("records"):
        numbers = (f"{scale * row[name]:.{digits}f}" for name in NUMBERS)
        of_class = f"{row['class']}: {scale * row['class_measured']:.{digits}f}"
        lines.append([f"`{row['first']}`", f"`{row['second']}`", *numbers, of_class])
    heads = ["first", "second", *NUMBERS.values(), "class"]
    ways = len({each.one for each in found.comparisons})
    left_out = found.units - len(found.inside)
    told = "\n".join(verdicts(found))
    page.write_text(
        f"""# Which units back each other up?

Written by `make sets` (`examples/sets_study.py`); do not edit. All {len(found.signs):,} pairs of
the {found.units} units of `{found.layer}` of `{found.network}` are ablated by zero with
[`pa.pairs`][pairs] on {found.images:,} images. The synergy of a pair is the damage without both
units beyond the sum of the damages without either. Damage is read in two ways, as the drop of
accuracy and as the rise of the mean loss. The loss is convex in the logits: two units that lower
the same logit do more harm together than apart even where nothing in the network interacts. So a
third reading, {BEYOND}, takes off the synergy that follows if what the two units do
to the logits is added up. The images are split at random into two halves, class by class: what is
chosen or found on one half is looked for on the other. Units *back each other up*
where their synergy is positive.

[pairs]: ../guides/experiments.md#what-two-units-do-together-papairs

## In short

{told}

*Back each other up* and *do less together than apart*: the 95 % interval of the mean (bootstrap
over units) lies above or below 0. Synergies *repeat well* if the interval of the rank correlation
between the halves lies above {WELL:g}, *in part* if it lies above 0. p is that of the exact sign
test between the images on which a pair does more and less harm than the sum; *more than with tossed
signs* means more pairs than in 97.5 % of the draws in which each image's sign was tossed, for all
pairs alike. Two ways to compare units are *alike* or *opposite* if q is at most {LEVEL:g}, *weakly*
if the correlation is below {WEAK:g}.

![synergies by cluster, by half of the images, and what goes with what](images/sets.png)

## The strongest pairs

The {len(lines)} pairs with the largest synergy by {found.best} on one half of the images, the
reading that repeats better, in {unit}. *Chosen* is that synergy; all other columns are of the other
half: *measured*, the synergy; *first alone*, *second alone* and *both*, the damage; *class*, that
with the largest synergy on the first half, and the pair's synergy in it on the other.

{_markdown(heads, lines)}
## What goes with it

Units are compared in {ways} ways, each a matrix over the pairs of units: the synergy by each
reading (units that back each other up count as close); the profile of accuracy drops over the
classes, and that of rises of the loss (cosine distance); the mean activations on the images (1
minus the correlation); the filters that make a unit, and the weights that read it (cosine
distance). {left_out} of the {found.units} units are never active on one of the halves and stay
out; a unit without class drops is at distance 1 from all others by these.

Each figure compares a way on one half of the images with another way on the other half, and is the
mean of both directions: no image's noise is on both sides. A way with itself tells what other
images alone cost. *Mantel* is the rank correlation over the pairs; *within* is the same after the
units' own levels were taken out of both matrices, since a unit whose ablation does much has large
synergies with all others: the sentences above use it. *Rand* is the adjusted Rand index of
{CLUSTERS} clusters each (complete linkage). q is from permutations of the units, adjusted over all
comparisons of two different ways (Benjamini-Hochberg).

{_markdown(["way", "against", "Mantel", "q", "within", "q", "Rand", "q"], _rows(found))}"""
    )


NUMBERS = {
    "chosen": "chosen",
    "measured": "measured",
    "alone": "first alone",
    "other_alone": "second alone",
    "joint": "both",
}


def _rows(found: Found) -> list[list[str]]:
    q = {
        figure: adjusted_over(found.comparisons, figure) for figure in ("mantel", "centred", "rand")
    }
    lines = []
    for each in found.comparisons:
        line = [each.one, each.other if each.one != each.other else "itself"]
        for figure in q:
            line.append(f"{getattr(each, figure)[0]:.2f}")
            of_pair = q[figure].get((each.one, each.other))
            line.append("" if of_pair is None else f"{of_pair:.3f}")
        lines.append(line)
    return lines


def draw(found: Found, path: Path) -> None:
    """Draw synergies by cluster, one half against the other, and the ways against one another."""
    reading: Reading = found.readings[found.best]
    scale, _, unit = SCALE[found.best]
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.8), layout="constrained")
    both = scale * np.mean(reading.halves, axis=0)
    matrix = square(both, found.units)
    tree = _tree(both.max() - both, "complete")
    order = hierarchy.leaves_list(tree)
    limit = np.quantile(np.abs(both), 0.99)
    shown = axes[0].imshow(matrix[np.ix_(order, order)], cmap="RdBu_r", vmin=-limit, vmax=limit)
    borders = np.flatnonzero(np.diff(clusters(both.max() - matrix)[order])) + 0.5
    for border in borders:
        axes[0].axhline(border, color="#8a8a86", linewidth=0.5)
        axes[0].axvline(border, color="#8a8a86", linewidth=0.5)
    axes[0].set(title=f"synergy by {found.best}, {unit}", xlabel="unit", ylabel="unit")
    axes[0].set_xticks([])
    axes[0].set_yticks([])
    figure.colorbar(shown, ax=axes[0])
    one, other = (scale * half for half in reading.halves)
    axes[1].scatter(one, other, s=4, color="#2a78d6", alpha=0.4, linewidths=0)
    axes[1].set(title="each pair, by half of the images", xlabel="one half", ylabel="the other")
    axes[1].axhline(0, color="#8a8a86", linewidth=0.5)
    axes[1].axvline(0, color="#8a8a86", linewidth=0.5)
    names = list(dict.fromkeys(each.one for each in found.comparisons))
    values = np.full((len(names), len(names)), np.nan)
    for each in found.comparisons:
        row, column = names.index(each.one), names.index(each.other)
        values[row, column] = values[column, row] = each.centred[0]
    shown = axes[2].imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
    for row, column in np.ndindex(values.shape):
        ink = "white" if abs(values[row, column]) > 0.6 else "black"
        text = f"{values[row, column]:.2f}"
        axes[2].text(column, row, text, ha="center", va="center", fontsize=7, color=ink)
    short = [name.replace("synergy, loss beyond added", "beyond added") for name in names]
    axes[2].set_xticks(range(len(names)), short, rotation=45, ha="right")
    axes[2].set_yticks(range(len(names)), short)
    axes[2].set_title("rank correlation over pairs, within units")
    # No software version or date in the file: equal results give equal pictures.
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)

"""Catalog of attributes: formula, source, family, invariance to rescaling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyablate._validation import nearest


@dataclass(frozen=True)
class Attribute:
    """One entry of the table.

    Attributes
    ----------
    name : str
        Name of the variable ``[unit]``.
    family : str
        What it is computed with; :func:`pyablate.attributes` takes these names too.
    formula, source : str
        As they stand in the data set.
    invariant : bool
        Whether scaling a ReLU unit by s > 0 and its outgoing weights by 1 / s, which changes no
        prediction, leaves it as it is.
    per_class : bool
        Whether there are also ``<name>_per_class`` ``[unit, class]`` and ``<name>_class``, the
        number of the class with the largest value (-1 where there is none).
    """

    name: str
    family: str
    formula: str
    source: str
    invariant: bool
    per_class: bool = False


_ZHOU = "Zhou et al. 2018, arXiv:1806.02891"
_LI = "Li et al. 2017, arXiv:1608.08710"
_LIU = "Liu et al. 2017, arXiv:1708.06519"
_GALE = "Gale et al. 2020"
_AMJAD = "Amjad et al. 2018"
_OUT = "over the weights that read the unit in the next layers"
_NORMAL = "for batch norm output N(beta, gamma^2)"

CATALOG: tuple[Attribute, ...] = (
    Attribute("l1_norm", "weights", "sum |w| over the filter", _LI, False),
    Attribute("l2_norm", "weights", "sqrt(sum w^2) over the filter", _LI, False),
    Attribute("l1_norm_outgoing", "weights", f"sum |w| {_OUT}", _LI, False),
    Attribute("l2_norm_outgoing", "weights", f"sqrt(sum w^2) {_OUT}", _LI, False),
    Attribute("bn_scale", "weights", "|gamma|", _LIU, False),
    Attribute("bn_active", "weights", f"Phi(beta / |gamma|): P(x > 0) {_NORMAL}", "moments", True),
    Attribute(
        "bn_mean_relu",
        "weights",
        f"beta Phi(beta / |gamma|) + |gamma| phi(beta / |gamma|): E[max(x, 0)] {_NORMAL}",
        "moments",
        False,
    ),
    Attribute(
        "spectral",
        "weights",
        "|P w|^2 / |w|^2; P projects on the leading right singular vectors of the layer's unfolded "
        "filters, as few as hold 90 % of the sum of squared singular values",
        "after DeepDataProfiler",
        False,
    ),
    Attribute(
        "orthogonality_loss",
        "weights",
        "sum over the layer's filters v and shifts s of (<w_u, w_v shifted by s> - [v = u and s = "
        "0])^2, s in multiples of the stride",
        "Wang et al. 2020, arXiv:1911.12207",
        False,
    ),
    Attribute(
        "nisp",
        "nisp",
        "s_k = |W_(k+1)|^T s_(k+1), 1 at each class, batch norm folded, max pooling as the mean, "
        "activations as the identity; summed over positions",
        "Yu et al. 2018, arXiv:1711.05908",
        False,
    ),
    Attribute("mean", "activations", "mean of A over images", "moments", False),
    Attribute("variance", "activations", "mean of (A - mean)^2 over images", "moments", False),
    Attribute("max", "activations", "max of A over images", "moments", False),
    Attribute("sparsity", "activations", "share of positions with a <= 0", "counts", True),
    Attribute("active_images", "activations", "share of images with some a > 0", "counts", True),
    Attribute(
        "class_selectivity",
        "selectivity",
        "(mu_k - mu_rest) / (mu_k + mu_rest), mu_k the mean of A over class k, mu_rest the mean of "
        "the other classes' means; the largest over k; NaN if a < 0 anywhere or both means are 0",
        "Morcos et al. 2018, arXiv:1803.06959",
        True,
        per_class=True,
    ),
    Attribute(
        "class_correlation",
        "selectivity",
        "Pearson r of A and the predicted probability p_k over images; the largest over k",
        _ZHOU,
        True,
        per_class=True,
    ),
    Attribute(
        "auc",
        "selectivity",
        "P(A of an image of class k > A of another image) + P(equal) / 2; the largest over k",
        _GALE,
        True,
        per_class=True,
    ),
    Attribute(
        "informedness",
        "selectivity",
        "max over thresholds t of P(A >= t | class k) - P(A >= t | others); the largest over k",
        _GALE,
        True,
        per_class=True,
    ),
    Attribute(
        "precision_at",
        "selectivity",
        "share of class k among the top images by A, the first of equal ones; the largest over k",
        "Zhou et al. 2015, arXiv:1412.6856",
        True,
        per_class=True,
    ),
    Attribute(
        "mutual_information",
        "information",
        "I(T; y) in nats, T the bin of A in bins of equal numbers of images (equal A in one bin), "
        "minus the Miller-Madow bias (m_Ty - m_T - m_y + 1) / (2 N) of m occupied cells",
        _AMJAD,
        True,
    ),
    Attribute(
        "kl_selectivity",
        "information",
        "KL(P(T | class k), P(T)) in nats, T as in mutual_information, no bias correction; the "
        "largest over k",
        _AMJAD,
        True,
        per_class=True,
    ),
    Attribute(
        "entropy",
        "information",
        "H(T) in nats, T the bin of A in bins of equal width from min A to max A, no bias "
        "correction",
        "Luo and Wu 2017, arXiv:1706.05791",
        True,
    ),
    Attribute(
        "redundancy",
        "redundancy",
        "max over the other units v of the layer of |Pearson r of A_u and A_v|",
        "correlation",
        True,
    ),
    Attribute(
        "taylor",
        "gradients",
        "mean over images (of class k) of |mean over positions of g a|, g the gradient of the "
        "cross-entropy",
        "Molchanov et al. 2017, arXiv:1611.06440",
        True,
        per_class=True,
    ),
    Attribute(
        "fisher",
        "gradients",
        "mean over images (of class k) of (sum over positions of g a)^2, g the gradient of the "
        "cross-entropy",
        "Theis et al. 2018, arXiv:1801.05787",
        True,
        per_class=True,
    ),
    Attribute(
        "hrank",
        "rank",
        "mean over sampled images of the rank of the H x W map",
        "Lin et al. 2020, arXiv:2002.10179",
        True,
    ),
    Attribute(
        "conductance",
        "conductance",
        "sum over positions and steps of the path from a zero image of grad (h_(t+1) - h_t) of the "
        "labelled class's logit; mean over sampled images (of class k)",
        "Dhamdhere et al. 2018, arXiv:1805.12233; computed by Captum",
        True,
        per_class=True,
    ),
    Attribute(
        "lrp",
        "lrp",
        "sum over positions of the relevance for the labelled class's logit, epsilon rule; mean "
        "over sampled images (of class k)",
        "Bach et al. 2015, doi:10.1371/journal.pone.0130140; computed by Captum",
        True,
        per_class=True,
    ),
    Attribute(
        "crp",
        "lrp",
        "relevance conditional on the labelled class as in lrp, as a share of the layer's: "
        "R_u / sum over its units v of |R_v|; mean over sampled images (of class k)",
        "Achtibat et al. 2023, doi:10.1038/s42256-023-00711-8; relevance computed by Captum",
        True,
        per_class=True,
    ),
    Attribute(
        "clrp",
        "clrp",
        "max(0, R_u / sum over its layer of R - S_u / sum over its layer of S), R the relevance "
        "for the labelled class by the z+ rule, S that for all others; mean over sampled images "
        "(of class k)",
        "Gu, Yang, Tresp 2018, arXiv:1812.02100",
        True,
        per_class=True,
    ),
    Attribute(
        "concept_iou",
        "concepts",
        "sum over images of |M and L| / |M or L|; M: the map, bilinear at the mask's size, above "
        "its 0.995 quantile over all positions and images; L the mask; the largest over concepts",
        "Bau et al. 2017, arXiv:1704.05796",
        True,
    ),
)

FAMILIES: tuple[str, ...] = tuple(dict.fromkeys(entry.family for entry in CATALOG))


def choose(which: str | Sequence[str]) -> tuple[Attribute, ...]:
    """Entries by name or family, in the order of the table."""
    if isinstance(which, str):
        which = [which]
    if not isinstance(which, Sequence) or not all(isinstance(name, str) for name in which):
        raise TypeError(f"which: expected names of attributes or families, got {which!r}")
    if not which:
        raise ValueError('which: expected names of attributes or "all", got an empty list')
    known = ["all", *FAMILIES, *(entry.name for entry in CATALOG)]
    for name in which:
        if name not in known:
            raise ValueError(f"which: no attribute {name!r}{nearest(name, known)}")
    wanted = set(which)
    return tuple(entry for entry in CATALOG if wanted & {"all", entry.family, entry.name})

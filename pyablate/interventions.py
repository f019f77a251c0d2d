"""Interventions: what replaces a unit while it is ablated.

An :class:`Intervention` is a specification, no more: how its values are computed is up to who
ablates (the delta engine and the plain reference loop each do it in their own way). What both
must share is the *definition* of anything random, so that lives here: draws depend on the seed,
the layer, the image, the unit and the position only, never on batches or order.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyablate._validation import check_choice, check_seed

Kind = Literal["zero", "constant", "mean", "class_mean", "resample", "noise", "direction"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class Intervention:
    """What a unit's map is replaced with.

    Attributes
    ----------
    kind : str
        - ``zero``: 0 everywhere.
        - ``constant``: ``value`` everywhere, or each unit's own of ``values``.
        - ``mean``: the unit's mean over all images and positions of the data.
        - ``class_mean``: its mean over the images that carry the image's own label.
        - ``resample``: its map on another image, the donor (see
          :func:`pyablate.interventions.donors`).
        - ``noise``: a Gaussian with the unit's mean and variance over images and positions,
          drawn independently at every position (see
          :func:`pyablate.interventions.gaussian`).
        - ``direction``: unit j is the j-th direction q of the layer and ``a`` becomes
          ``a - (a . q) q`` across the channels, at every position.
    value : float
        For ``constant``, where ``values`` are not given.
    seed : int
        For ``resample``, ``noise`` and for random directions.
    directions : Tensor or mapping of str to Tensor, optional
        For ``direction``: ``[channels, directions]``, one for all layers or one by layer name.
        Columns are scaled to length 1. None means the columns of a random orthogonal matrix,
        drawn for each layer from the seed.
    values : Tensor or mapping of str to Tensor, optional
        For ``constant``: ``[units]``, one number for each unit, of all layers or by layer name; of
        attention heads one for each of their features. :func:`pyablate.optimal_constants` finds
        those that do the least damage.

    Examples
    --------
    >>> axes = pa.interventions.random_rotation(128, seed=0)
    >>> turned = pa.Intervention("direction", directions=axes)
    >>> pa.ablate(model, data, "features.16", intervention=turned).intervention
    'direction:given'
    >>> floor = pa.Intervention("constant", values=torch.full((128,), 0.1))
    >>> pa.ablate(model, data, "features.16", intervention=floor).intervention
    'constant:given'
    """

    kind: Kind = "zero"
    value: float = 0.0
    seed: int = 0
    directions: Tensor | Mapping[str, Tensor] | None = None
    values: Tensor | Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        check_choice("intervention", self.kind, KINDS)
        if not math.isfinite(self.value):
            raise ValueError(f"intervention: value must be finite, got {self.value}")
        if self.values is not None and (self.kind != "constant" or self.value != 0):
            raise ValueError(
                f"values: expected for 'constant' and without a value, got {self.kind!r} with "
                f"value {self.value}"
            )
        check_seed(self.seed)

    def __str__(self) -> str:
        """Return the text from which :func:`parse` makes the same intervention.

        Given directions or values have no text that tells them apart: ``"direction:given"``,
        ``"constant:given"``.
        """
        if self.values is not None:
            return "constant:given"
        if self.kind == "constant":
            return f"constant:{float(self.value)!r}".removesuffix(".0")
        if self.directions is not None and self.kind == "direction":
            return "direction:given"
        if self.kind in ("resample", "noise", "direction"):
            return f"{self.kind}:{self.seed}"
        return self.kind

    @property
    def needs_statistics(self) -> bool:
        """Whether means or variances over the data must be known first."""
        return self.kind in ("mean", "class_mean", "noise")

    @property
    def beyond_data(self) -> bool:
        """Whether the replacement of a unit may be larger than any activation of it."""
        return self.kind in ("constant", "noise", "direction")

    def matrix(self, layer: str, channels: int) -> Tensor:
        """Directions of one layer.

        Returns
        -------
        Tensor
            Float64 ``[channels, directions]``, columns of length 1.

        Raises
        ------
        ValueError
            No matrix for this layer, a wrong shape, or a column that has no direction.
        """
        given = _of_layer("directions", self.directions, layer)
        if given is None:
            return _rotation(channels, _mix_seed(self.seed, layer))
        matrix = torch.as_tensor(given, dtype=torch.float64, device="cpu")
        if matrix.ndim != 2 or matrix.shape[0] != channels or matrix.shape[1] == 0:
            raise ValueError(
                f"directions: layer {layer!r} needs a matrix [{channels}, directions], "
                f"got {list(matrix.shape)}"
            )
        length = matrix.norm(dim=0)
        if not bool((torch.isfinite(length) & (length > 0)).all()):
            raise ValueError(f"directions: a column for layer {layer!r} is zero or not finite")
        unit: Tensor = matrix / length
        return unit

    def constants(self, layer: str, channels: int) -> Tensor:
        """Numbers that replace the units of one layer under ``constant``.

        Returns
        -------
        Tensor
            Float64 ``[channels]``.

        Raises
        ------
        ValueError
            No values for this layer, another number of them, or one that is not finite.
        """
        given = _of_layer("values", self.values, layer)
        if given is None:
            given = torch.full((channels,), self.value, dtype=torch.float64, device="cpu")
        values = torch.as_tensor(given, dtype=torch.float64, device="cpu").detach()
        if values.shape != (channels,):
            raise ValueError(
                f"values: layer {layer!r} needs {channels} numbers, one for each unit, got shape "
                f"{list(values.shape)}"
            )
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"values: one for layer {layer!r} is not finite")
        return values


def _of_layer(name: str, given: Tensor | Mapping[str, Tensor] | None, layer: str) -> Tensor | None:
    """Pick what was given for a layer, by its name or for all of them."""
    if not isinstance(given, Mapping):
        return given
    if layer not in given:
        raise ValueError(f"{name}: none given for layer {layer!r}; has {list(given)}")
    return given[layer]


def parse(spec: str | Intervention, *, seed: int = 0) -> Intervention:
    """Make an intervention from its name.

    Parameters
    ----------
    spec : str or Intervention
        ``"zero"``, ``"mean"``, ``"class_mean"`` (or ``"class-mean"``), ``"constant:0.5"``,
        ``"resample"``, ``"noise"``, ``"direction"``; the last three take a seed,
        as in ``"noise:7"``.
    seed : int
        Seed of a random intervention whose text names none.

    Raises
    ------
    ValueError
        Unknown name, or a value that is not a number.
    TypeError
        Neither a string nor an Intervention.

    Examples
    --------
    >>> pa.interventions.parse("constant:0.5").value, pa.interventions.parse("noise:7").seed
    (0.5, 7)
    """
    if isinstance(spec, Intervention):
        return spec
    if not isinstance(spec, str):
        raise TypeError(
            f"intervention: expected a string or an Intervention, got {type(spec).__name__}"
        )
    name, colon, argument = spec.strip().partition(":")
    name = name.replace("-", "_")
    value, number = 0.0, seed
    try:
        if colon and name == "constant":
            value = float(argument)
        elif colon:
            number = int(argument)
    except ValueError:
        raise ValueError(f"intervention: {argument!r} in {spec!r} is not a number") from None
    if colon and name in ("zero", "mean", "class_mean"):
        raise ValueError(f"intervention: {name} takes no value, got {spec!r}")
    if name == "constant":
        return Intervention("constant", value=value)
    return Intervention(name, seed=number)  # type: ignore[arg-type]  # checked in __post_init__


def donors(seed: int, images: int) -> np.ndarray:
    """For every image, the other image whose map replaces its own under ``resample``.

    Returns
    -------
    ndarray
        int64 ``[images]``: one random cycle through all images, so nobody is their own donor.

    Raises
    ------
    ValueError
        Fewer than two images.

    Examples
    --------
    >>> donors = pa.interventions.donors(0, 5)
    >>> sorted(donors.tolist()), bool((donors == np.arange(5)).any())
    ([0, 1, 2, 3, 4], False)
    """
    if images < 2:
        raise ValueError(f"intervention: resample needs at least 2 images, got {images}")
    order = np.random.Generator(np.random.Philox(seed)).permutation(images)
    donor = np.empty(images, dtype=np.int64)
    donor[order] = np.roll(order, -1)
    return donor


def gaussian(seed: int, layer: str, image: Tensor, unit: Tensor, positions: int) -> Tensor:
    """Draw standard normals that depend on seed, layer, image, unit and position only.

    Parameters
    ----------
    seed : int
        Seed of the intervention.
    layer : str
        Name of the site.
    image, unit : Tensor
        int64, shapes that broadcast together.
    positions : int
        Number of positions of the unit's map.

    Returns
    -------
    Tensor
        Float64, the broadcast shape of image and unit with ``positions`` appended.

    Examples
    --------
    >>> one, two = torch.tensor([3]), torch.tensor([17])
    >>> pa.interventions.gaussian(0, "features.16", one, two, 4).shape
    torch.Size([1, 4])
    """
    pair = image * 1_000_003 + unit
    counter = pair.unsqueeze(-1) * positions + torch.arange(positions, device=pair.device)
    key = _mix_seed(seed, layer)
    first, second = _scramble(counter * 2 + key), _scramble(counter * 2 + 1 + key)
    scale = 2.0**-53
    # An integer tensor times a number would be float32.
    radius = torch.sqrt(-2.0 * torch.log((_shift_right(first, 11).double() + 1) * scale))
    return radius * torch.cos(2.0 * math.pi * scale * _shift_right(second, 11).double())


def uniform(seed: int, row: NDArray[np.int64], image: NDArray[np.int64]) -> NDArray[np.float64]:
    """Draw numbers in ``[0, 1)`` that depend on seed, row and image only.

    Parameters
    ----------
    seed : int
        Any number.
    row, image : ndarray
        int64 ``[P]``: row of the result and index of the image.

    Returns
    -------
    ndarray
        float64 ``[P]``.

    Examples
    --------
    >>> drawn = pa.interventions.uniform(0, np.array([3, 4]), np.array([17, 17]))
    >>> bool((drawn >= 0).all() and (drawn < 1).all()), len(set(drawn))
    (True, 2)
    """
    key = _scramble(torch.tensor(_mix_seed(seed, "uniform")))
    first = _scramble(torch.from_numpy(np.asarray(row, np.int64)) + key)
    second = _scramble(first ^ torch.from_numpy(np.asarray(image, np.int64)))
    drawn: NDArray[np.float64] = _shift_right(second, 11).double().numpy() * 2.0**-53
    return drawn


def random_rotation(channels: int, *, seed: int = 0) -> Tensor:
    """Random orthogonal matrix, uniform over rotations and reflections.

    Returns
    -------
    Tensor
        Float64 ``[channels, channels]``.

    Examples
    --------
    >>> q = pa.interventions.random_rotation(8, seed=0)
    >>> torch.allclose(q @ q.T, torch.eye(8, dtype=q.dtype), atol=1e-6)
    True
    """
    draw = np.random.Generator(np.random.Philox(seed)).standard_normal((channels, channels))
    q, r = np.linalg.qr(draw)
    return torch.from_numpy(q * np.sign(np.diag(r)))  # the sign makes the distribution uniform


@functools.lru_cache(maxsize=256)
def _rotation(channels: int, seed: int) -> Tensor:
    """Remember rotations: every batch asks for them again."""
    return random_rotation(channels, seed=seed)


def _mix_seed(seed: int, layer: str) -> int:
    """Give each layer draws of its own; 62 bits, so that counters can be added."""
    return ((seed & 0x3FFFFFFF) << 32) ^ zlib.crc32(layer.encode())


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift as if unsigned: torch shifts the sign bit in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _scramble(x: Tensor) -> Tensor:
    """Hash 64-bit counters (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685
    return x ^ _shift_right(x, 31)

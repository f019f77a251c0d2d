"""Elementwise functions as the native operations know them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

ActivationName = Literal[
    "identity",
    "relu",
    "hardtanh",
    "leaky_relu",
    "elu",
    "gelu",
    "gelu_tanh",
    "silu",
    "hardswish",
    "hardsigmoid",
    "sigmoid",
    "tanh",
]
_ACTIVATIONS: tuple[str, ...] = get_args(ActivationName)  # the order of csrc's enum


@dataclass(frozen=True)
class Activation:
    """An elementwise function with at most two parameters.

    Attributes
    ----------
    name : str
        One of identity, relu, hardtanh, leaky_relu, elu, gelu, gelu_tanh, silu, hardswish,
        hardsigmoid, sigmoid, tanh.
    a, b : float
        hardtanh: its minimum and maximum (ReLU6 is 0 and 6); leaky_relu: the slope; elu: alpha.

    Raises
    ------
    ValueError
        If the name is unknown, or a hardtanh's minimum is above its maximum.

    Examples
    --------
    >>> pa.ops.Activation("leaky_relu", 0.1)
    Activation(name='leaky_relu', a=0.1, b=0.0)
    """

    name: ActivationName
    a: float = 0.0
    b: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in _ACTIVATIONS:
            raise ValueError(
                f"activation: expected one of {', '.join(_ACTIVATIONS)}; got {self.name!r}"
            )
        if self.name == "hardtanh" and not self.a <= self.b:
            raise ValueError(f"activation: hardtanh needs a <= b, got a={self.a}, b={self.b}")

    @property
    def code(self) -> int:
        """The number under which the compiled backends know the function."""
        return _ACTIVATIONS.index(self.name)

    @property
    def monotone(self) -> bool:
        """Whether the function never falls, so that it may be applied after a maximum."""
        if self.name in {"leaky_relu", "elu"}:
            return self.a >= 0
        return self.name not in {"gelu", "gelu_tanh", "silu", "hardswish"}

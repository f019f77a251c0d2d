"""What the clean run of one image batch leaves for the ablations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, fx

from pyablate.engine.rounding import Rounding
from pyablate.engine.score import Prediction
from pyablate.network.graph import Value


@dataclass(frozen=True)
class Clean:
    """The clean run of one image batch.

    Attributes
    ----------
    tensors : mapping
        The tensors that the suffixes read.
    logits : Tensor
        ``[N, K]``.
    prediction : Tensor
        int32 ``[N]``, exact.
    tolerance : Tensor
        ``[N]``: top-2 margins up to this are not trusted.
    rounding : Rounding
        What the tolerance rests on.
    watched : Tensor
        int64, on the CPU: positions of the images on which errors are measured first.
    irregular : frozenset of fx.Node
        Nodes whose tensors hold NaN or infinity, of which there are no differences.
    predicted_change : Prediction or None
        What gradients say of the ablations, in a screened run.
    """

    tensors: Mapping[fx.Node, Value]
    logits: Tensor
    prediction: Tensor
    tolerance: Tensor
    rounding: Rounding = field(default_factory=Rounding)
    watched: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    irregular: frozenset[fx.Node] = frozenset()
    predicted_change: Prediction | None = None

    @cached_property
    def predicted(self) -> Tensor:
        """``prediction`` on the CPU."""
        return self.prediction.cpu()

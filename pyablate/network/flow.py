"""One forward pass, watched operator by operator: what reads what, and where features lie.

Every tensor that follows from the images is a :class:`Step`. Each of its axes is a list of factors,
and each factor knows which weights made it, so that an axis of features is followed through
reshapes, permutations, splits and joins instead of being guessed from sizes.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyablate.network.layout import BatchLayout


class Factor(NamedTuple):
    """Part of an axis.

    Attributes
    ----------
    size : int
        Entries.
    generation : int
        Number of the map by weights that made them; 0 of positions, -2 of images.
    stride : int
        How far apart in the output dimension of that map two neighbours lie.
    """

    size: int
    generation: int = 0
    stride: int = 1


Axis = tuple[Factor, ...]
"""Factors of an axis, the outermost first."""

_MIXED = -1  # features and positions in one factor
_IMAGES = -2

_DATA_AND_WEIGHT = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
_REDUCTIONS = frozenset(
    "mean sum amax amin max min var std var_mean std_mean prod logsumexp norm linalg_vector_norm "
    "any all argmax argmin".split()
)
_RESHAPES = frozenset("view _unsafe_view reshape _reshape_alias unsqueeze squeeze".split())
_PERMUTATIONS = frozenset("permute transpose t numpy_T".split())
_CUTS = frozenset("select unbind slice split split_with_sizes".split())
_JOINS = frozenset({"cat", "stack"})
_NORMS = frozenset(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
    "cudnn_batch_norm miopen_batch_norm native_layer_norm native_group_norm".split()
)
_LINEAR = frozenset(
    "add sub rsub neg mul div clone _to_copy copy alias detach lift_fresh fill".split()
)
_POINTWISE = frozenset(  # which torch does not call so
    "_prelu_kernel hardswish glu log_sigmoid_forward rrelu_with_noise".split()
)
_PRODUCTS = frozenset({"mul", "div"})


@dataclass(eq=False)
class Step:
    """One tensor that depends on the images, and the operator that returned it.

    Attributes
    ----------
    op : str
        Name of the ATen operator, without a trailing underscore.
    number : int
        Position in the forward pass.
    shape : tuple of int
        Batch included.
    axes : list of Axis
        What each axis is made of.
    inputs : list of Step
        Arguments that depend on the images.
    pointwise : bool
        Whether the operator treats every element by itself.
    within : str
        The innermost module that was running.
    source : str or None
        The same, where the operator is a map by weights.
    offset : int or None
        Where its features begin in the output dimension of the map that made them; None where
        that is not known.
    readers : list of Step
        Operators that take this tensor.
    function : int or None
        Position of the call of a function of torch that the network made to get this tensor.
    """

    op: str
    number: int
    shape: tuple[int, ...]
    axes: list[Axis]
    inputs: list[Step] = field(default_factory=list)
    pointwise: bool = False
    within: str = ""
    source: str | None = None
    offset: int | None = None
    depthwise: bool = False
    readers: list[Step] = field(default_factory=list)
    function: int | None = None

    def feature_axis(self) -> int | None:
        """Axis that the latest weights made, or None where there is none or more than one."""
        generations = [_generation(axis) for axis in self.axes[1:]]
        latest = max(generations, default=0)
        if len(self.shape) == 2:  # nothing but entries: maps may have been flattened
            return 1 if latest or _MIXED in generations else None
        if latest <= 0 or generations.count(latest) != 1:
            return None
        return 1 + generations.index(latest)

    def keeps_units_of(self, origin: Step) -> bool:
        """Whether each unit of an input is still one here, neither mixed nor summed over."""
        if self.source is not None:
            return self.depthwise
        if self.op in _DATA_AND_WEIGHT:  # of two tensors: one axis of each is summed over
            at = -1 if origin is self.inputs[-2] else -2
            return not _made_by(origin.axes[at], latest_of(origin))
        if self.attends:  # query, key, value
            return len(self.inputs) < 3 or origin is self.inputs[2]
        return not (self.op in _REDUCTIONS and self._sums_features(origin))

    def _sums_features(self, origin: Step) -> bool:
        latest = latest_of(origin)
        return latest > 0 and not any(_made_by(axis, latest) for axis in self.axes)

    @property
    def split(self) -> bool:
        """Whether features lie along several axes, as those of attention heads do."""
        latest = max(map(_generation, self.axes[1:]), default=0)
        return latest > 0 and sum(_generation(axis) == latest for axis in self.axes[1:]) > 1

    def images(self) -> BatchLayout | None:
        """Say where the images lie, if that is known."""
        for at, axis in enumerate(self.axes):
            for place, factor in enumerate(axis):
                whole = math.prod(one.size for one in axis)
                if factor.generation == _IMAGES and whole == self.shape[at]:
                    outer = math.prod(one.size for one in axis[:place])
                    return BatchLayout(at, whole // (outer * factor.size), outer)
        return None

    def features(self) -> list[Factor]:
        """Factors that the latest weights made, in the order of the axes."""
        latest = latest_of(self)
        return [one for axis in self.axes for one in axis if one.generation == latest > 0]

    @property
    def multiplies_matrices(self) -> bool:
        """Whether this is a product of two tensors that vary."""
        return self.op in _DATA_AND_WEIGHT and self.source is None

    @property
    def attends(self) -> bool:
        """Whether this is the library's attention."""
        return "attention" in self.op

    @property
    def mixes(self) -> bool:
        """Whether this is a map by weights or a product of matrices."""
        return self.source is not None or self.op in _DATA_AND_WEIGHT or self.attends

    @property
    def normalises(self) -> bool:
        """Whether this is batch norm, layer norm or group norm."""
        return self.op in _NORMS

    @property
    def units(self) -> int:
        """Number of features, 0 where they have no axis of their own."""
        axis = self.feature_axis()
        return 0 if axis is None else self.shape[axis]

    @property
    def reduces(self) -> bool:
        """Whether this is a sum, a mean or the like over some axes."""
        return self.op in _REDUCTIONS

    @property
    def multiplies(self) -> bool:
        """Whether this is a product of tensors."""
        return self.op in _PRODUCTS

    @property
    def bends(self) -> bool:
        """Whether this is a pointwise nonlinearity: products of tensors that vary are ones."""
        if not self.pointwise:
            return False
        return self.op not in _LINEAR or (self.multiplies and len(self.inputs) > 1)


@dataclass
class Flow(TorchDispatchMode):
    """Watches operators while it is entered; :meth:`begin` says what the images are."""

    inside: Sequence[tuple[str, nn.Module]]
    steps: list[Step] = field(default_factory=list)
    _known: dict[int, tuple[weakref.ref[Tensor], Step]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def begin(self, images: Tensor) -> None:
        """Take a tensor for the images."""
        step = Step("", 0, tuple(images.shape), _positions(images.shape))
        step.axes[0] = (Factor(len(images), _IMAGES),)
        self._remember(images, step)

    def step(self, tensor: Any) -> Step | None:
        """Return the step of a tensor as it is now; None if it does not depend on the images."""
        known = self._known.get(id(tensor)) if isinstance(tensor, Tensor) else None
        return known[1] if known is not None and known[0]() is tensor else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and note it."""
        kwargs = kwargs or {}
        given = list(_tensors([*args, *kwargs.values()]))
        inputs = [step for step in map(self.step, given) if step is not None]
        before = [self.step(argument) for argument in args]
        out = func(*args, **kwargs)
        if inputs:
            for part, tensor in enumerate(_tensors([out])):
                self._note(func, args, kwargs, tensor, inputs, before, part)
        return out

    def _note(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        tensor: Tensor,
        inputs: list[Step],
        before: list[Step | None],
        part: int,
    ) -> None:
        op = func._schema.name.partition("::")[2]
        op = op if op.startswith("_") else op.rstrip("_")
        pointwise = torch.Tag.pointwise in func.tags or op in _POINTWISE
        number = len(self.steps) + 1
        shape = tuple(tensor.shape)
        step = Step(op, number, shape, _positions(shape), inputs, pointwise)
        step.within = self.inside[-1][0] if self.inside else ""
        if self._maps_by_weights(op, before):
            step.source = step.within
            groups = _argument(func, args, kwargs, "groups") if op == "convolution" else 1
            step.depthwise = groups > 1 and groups == inputs[0].shape[1] == shape[1]
        step.axes = _axes(step, func, args, kwargs, before)
        step.offset = _offset(step, func, args, kwargs, part)
        self.steps.append(step)
        for source in dict.fromkeys(inputs):
            source.readers.append(step)
        self._remember(tensor, step)

    @staticmethod
    def _maps_by_weights(op: str, before: list[Step | None]) -> bool:
        if op in _DATA_AND_WEIGHT:
            return any(before[at] is None for at in _DATA_AND_WEIGHT[op])
        return op in ("convolution", "embedding", "linear") or "rnn" in op

    def _remember(self, tensor: Tensor, step: Step) -> None:
        self._known[id(tensor)] = (weakref.ref(tensor), step)  # large networks need the memory


def _axes(step: Step, func: Any, args: Any, kwargs: Any, before: list[Step | None]) -> list[Axis]:
    """Say what the axes of a step's tensor are made of."""
    shape, op, first = step.shape, step.op, step.inputs[0]
    if step.source is not None:
        return _mapped(step, before)
    if op in _DATA_AND_WEIGHT:
        a, b = step.inputs[-2:]
        # Heads are those of the values, not of the queries and keys that weigh them.
        both = zip(a.axes[:-2], b.axes[:-2], strict=False)
        return [*(two if _generation(two) else one for one, two in both), a.axes[-2], b.axes[-1]]
    if op in _RESHAPES:
        return _regrouped(first.axes, shape)
    if op in _PERMUTATIONS:
        return _permuted(first, func, args, kwargs)
    if op == "expand":
        return _broadcast([first], shape)
    if op in ("select", "unbind"):
        dim = _argument(func, args, kwargs, "dim") % len(first.axes)
        return first.axes[:dim] + first.axes[dim + 1 :]
    if op in _JOINS:
        return _joined(step, _argument(func, args, kwargs, "dim"))
    if op in _REDUCTIONS:
        return _reduced(first, shape, _argument(func, args, kwargs, "dim"))
    if op == "im2col":
        features = (Factor(shape[1], _generation(first.axes[1])),)
        return [first.axes[0], features, *_positions(shape[2:])]
    if step.pointwise and op != "glu":
        return _broadcast(step.inputs, shape)
    if "attention" in op and len(step.inputs) > 2 and len(shape) == len(first.shape):
        values = _resized(step.inputs[2].axes, shape)
        return [*values[:-2], first.axes[-2], values[-1]]
    same = len(first.shape) == len(shape)
    return _resized(first.axes, shape) if same else _positions(shape)


def _mapped(step: Step, before: list[Step | None]) -> list[Axis]:
    """Axes behind a map by weights: those of its output dimension are features anew."""
    shape, data = step.shape, step.inputs[0]
    if step.op in _DATA_AND_WEIGHT and before[_DATA_AND_WEIGHT[step.op][0]] is None:
        axes = _resized(data.axes, shape)
        return [*axes[:-2], (Factor(shape[-2], step.number),), axes[-1]]
    if step.op == "convolution":
        return [data.axes[0], (Factor(shape[1], step.number),), *_positions(shape[2:])]
    kept = data.axes if step.op == "embedding" else data.axes[:-1]
    kept = kept if len(kept) == len(shape) - 1 else _positions(shape[:-1])
    return [*kept, (Factor(shape[-1], step.number),)]


def _offset(step: Step, func: Any, args: Any, kwargs: Any, part: int) -> int | None:
    """Say where the features of a step's tensor begin in what the map that made them returned."""
    first, op = step.inputs[0], step.op
    if step.source is not None:
        return 0
    if first.offset is None or op not in _CUTS:
        whole = op in _RESHAPES | _PERMUTATIONS | {"expand"} or step.pointwise or step.normalises
        return _common_offset(step) if whole and op != "glu" else None

    def given(name: str) -> Any:
        return _argument(func, args, kwargs, name)

    dim = given("dim") % len(first.axes)
    if op == "select":
        start = given("index")
    elif op == "slice":
        start = given("start") or 0
    elif op == "split_with_sizes":
        start = sum(given("split_sizes")[:part])
    else:
        start = part * (given("split_size") or 1)
    if not _made_by(first.axes[dim], latest_of(first)):
        return first.offset
    if op == "slice" and (given("step") or 1) != 1:
        return None
    if start == 0:
        return first.offset
    cut = consecutive(first.axes[dim])
    stride = first.axes[dim][-1].stride
    return first.offset + start % first.shape[dim] * stride if cut else None


def _common_offset(step: Step) -> int | None:
    """Offset of the features that a step's inputs share; none of a sum of different parts."""
    latest = max(map(latest_of, step.inputs))
    found = {one.offset for one in step.inputs if latest_of(one) == latest} - {None}
    return found.pop() if len(found) == 1 else None


def consecutive(factors: Sequence[Factor]) -> bool:
    """Whether factors, the outermost first, run through features at one distance."""
    pairs = itertools.pairwise(factors)
    return all(outer.stride == inner.size * inner.stride for outer, inner in pairs)


def _positions(shape: Iterable[int]) -> list[Axis]:
    return [(Factor(int(size)),) for size in shape]


def _generation(axis: Axis) -> int:
    """Which weights made an axis: the latest of them, 0 for positions, -1 for both at once."""
    factors = [factor for factor in axis if factor.size > 1] or axis
    generations = [0 if one.generation == _IMAGES else one.generation for one in factors]
    return _MIXED if 0 in generations and any(generations) else max(generations, default=0)


def latest_of(step: Step) -> int:
    """Return the number of the latest map by weights that made features of a step's tensor."""
    return max((one.generation for axis in step.axes for one in axis), default=0)


def _made_by(axis: Axis, number: int) -> bool:
    return number > 0 and any(one.generation == number for one in axis)


def _regrouped(axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis]:
    """Spread the factors of all axes, in order, over the axes of a reshaped tensor."""
    left = [factor for axis in axes for factor in axis if factor.size != 1][::-1]
    found: list[Axis] = []
    for size in shape:
        axis: list[Factor] = []
        wanted = int(size)
        while wanted > 1:
            if not left:
                return _positions(shape)
            have, generation, stride = left.pop()
            part = math.gcd(have, wanted)
            if part != min(have, wanted):
                return _positions(shape)
            axis.append(Factor(part, generation, stride * (have // part)))
            if have > part:
                left.append(Factor(have // part, generation, stride))
            wanted //= part
        found.append(tuple(axis) or (Factor(1),))
    return found


def _permuted(first: Step, func: Any, args: Any, kwargs: Any) -> list[Axis]:
    axes = list(first.axes)
    if func._schema.name == "aten::permute":
        return [axes[dim] for dim in _argument(func, args, kwargs, "dims")]
    if func._schema.name.startswith("aten::transpose"):
        one, two = (_argument(func, args, kwargs, name) for name in ("dim0", "dim1"))
        axes[one], axes[two] = axes[two], axes[one]
        return axes
    return axes[::-1]


def _broadcast(inputs: Sequence[Step], shape: Sequence[int]) -> list[Axis]:
    """Axes of an elementwise result: features where all tensors of full size have them."""
    found: list[Axis] = []
    for axis in range(-len(shape), 0):
        full = [s.axes[axis] for s in inputs if len(s.axes) >= -axis and s.shape[axis] != 1]
        whole = [s.axes[axis] for s in inputs if s.shape == tuple(shape)] or full
        common = [a for a in whole if _generation(a) == 0] or whole or full
        found.append(max(common, key=_generation) if common else (Factor(int(shape[axis])),))
    kept = [_generation(axis) for axis in found]
    if not any(kept):  # features of one along one axis, of another along another
        candidates = [s for s in inputs if s.shape == tuple(shape)]
        return list(candidates[0].axes) if candidates else found
    return found


def _joined(step: Step, dim: int | None) -> list[Axis]:
    shape = step.shape
    at = (dim or 0) % len(shape)
    parts = [s for s in step.inputs if len(s.axes) in (len(shape), len(shape) - 1)]
    if not parts:
        return _positions(shape)
    axes = [max(pair, key=_generation) for pair in zip(*(s.axes for s in parts), strict=False)]
    if len(parts[0].axes) < len(shape):
        return [*axes[:at], (Factor(shape[at]),), *axes[at:]]
    axes[at] = (Factor(shape[at], _generation(axes[at])),)
    return axes


def _reduced(first: Step, shape: Sequence[int], dims: Any) -> list[Axis]:
    if len(first.axes) == len(shape):
        return [
            (Factor(1),) if new == 1 else axis for axis, new in zip(first.axes, shape, strict=True)
        ]
    given = [dims] if isinstance(dims, int) else list(dims or ())
    gone = {dim % len(first.axes) for dim in given}
    axes = [axis for at, axis in enumerate(first.axes) if at not in gone]
    return axes if len(axes) == len(shape) else _positions(shape)


def _resized(axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis]:
    """Keep what each axis is made of where only its length changes."""
    return [
        axis
        if math.prod(one.size for one in axis) == new
        else (Factor(int(new), _generation(axis), axis[-1].stride),)
        for axis, new in zip(axes, shape, strict=False)
    ]


def _argument(func: Any, args: Any, kwargs: Any, name: str) -> Any:
    for at, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            default = argument.default_value if argument.has_default_value() else None
            return args[at] if at < len(args) else kwargs.get(name, default)
    return None


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)

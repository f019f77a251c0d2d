"""Forward passes of a user's model: in-place layers, a batch of one, and what comes out.

Some networks work in place on their input, some squeeze a batch of one away, and some return
something else than logits. :func:`forward` copies the images and runs two at least, so that nobody
else has to know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pyablate._validation import first_line
from pyablate.runtime import chunking

aten = torch.ops.aten

_COUNTED = (aten.convolution, aten.mm, aten.addmm, aten.bmm, aten.baddbmm)


def forward(model: Callable[[Tensor], Any], images: Tensor) -> Any:
    """Run a network on a copy of some images ``[N, ...]``, twice on one that is alone.

    Hooks on the network see two rows at least; the result has one for each image.
    """
    if len(images) > 1:
        return model(images.clone())
    found = model(torch.cat([images, images]))
    return found[:1] if isinstance(found, Tensor) else found


def two_images(sample: Tensor) -> Tensor:
    """First and last image, ``[2, ...]``, for what is asked of a network rather than of data."""
    return torch.stack([sample[0], sample[-1]])


def check_logits(found: Any, images: int) -> Tensor:
    """Refuse what a network returned if it is not one tensor of logits ``[N, classes]``."""
    if isinstance(found, Tensor) and found.shape in ((images,), (images, 1)):
        raise ValueError(
            "model: expected logits of at least 2 classes, got 1; one logit an image is made "
            'two classes by logits="binary" (of ablate, or of classifier)'
        )
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != images:
        got = list(found.shape) if isinstance(found, Tensor) else contents(found)
        other = "" if isinstance(found, Tensor) else "; logits= of ablate or classifier picks one"
        raise TypeError(f"model: expected logits [N, classes], got {got}{other}")
    return found


def contents(found: Any) -> str:
    """Say what a network returned: types, names and shapes."""
    if isinstance(found, Tensor):
        return f"a tensor {list(found.shape)}"
    kind = type(found).__name__
    if isinstance(found, Mapping):
        items = [f"{key!r} {_shape(one)}" for key, one in found.items()]
    elif isinstance(found, (tuple, list)):
        items = [_shape(one) for one in found]
    else:
        items = [f"{name!r} {_shape(one)}" for name, one in getattr(found, "__dict__", {}).items()]
    return f"{kind} of {', '.join(items) or 'nothing'}"


def _shape(item: Any) -> str:
    return str(list(item.shape)) if isinstance(item, Tensor) else type(item).__name__


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer."""
    return _first(model).device


def own_dtype(model: nn.Module) -> torch.dtype:
    """Dtype in which weights and images are compared: float64 if the model is, else float32."""
    return torch.float64 if _first(model).dtype == torch.float64 else torch.float32


def _first(model: nn.Module) -> Tensor:
    return next(iter([*model.parameters(), *model.buffers(), torch.zeros(0)]))


def usable_device(device: str | torch.device) -> torch.device:
    """Return a device, or refuse one that this machine does not have."""
    try:
        where = torch.device(device)
        torch.zeros(1, device=where)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device: {device!r} cannot be used here: {first_line(error)}") from None
    return where


def images_at_a_time(cost: Cost, images: Tensor) -> int:
    """As many images as keep the costliest call of a network short, and at least two.

    ``cost`` is of a few images; these ``[N, ...]`` are the same in the precision that is meant.
    """
    if images.device.type != "cpu":
        return torch.iinfo(torch.int32).max
    longest = 4 * chunking.LONGEST // images.element_size()
    return int(max(2, longest * len(images) // max(cost.most, 1)))


def cost_of(model: nn.Module, images: Tensor) -> Cost:
    """Count what a network does with some images ``[N, ...]``, two at least, by running it."""
    count = Cost()
    with torch.no_grad(), count:
        forward(model, images)
    return count


class Cost(TorchDispatchMode):
    """Counts operators that run meanwhile, and multiplications and additions in them.

    Attributes
    ----------
    calls : int
        Operators.
    total, most : int
        Multiplications and additions of all, and of the costliest.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = self.total = self.most = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self.calls += 1
        if function.overloadpacket in _COUNTED:
            formula = cast(Callable[..., int], flop_registry[function.overloadpacket])
            operations = formula(*args, **(kwargs or {}), out_val=result)
            self.total += operations
            self.most = max(self.most, operations)
        return result

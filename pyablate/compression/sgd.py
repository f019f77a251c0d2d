"""The training loop (SGD) that fine-tuning and all that trains while it compresses share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyablate._validation import check_count, check_seed
from pyablate.comparison.evaluation import prepared
from pyablate.data.dataset import Data
from pyablate.network.classifier import giving_logits
from pyablate.network.forward import check_logits, device_of
from pyablate.network.model_checks import fit_inputs
from pyablate.runtime.determinism import undisturbed
from pyablate.runtime.progress import Report, reporting

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of images and labels: mean cross entropy, and a penalty that is added to it."""
Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Schedule:
    """How a network is trained: stochastic gradient descent, the rate falling along a cosine to 0.

    Order and dropout are drawn from the seed; ``augment`` takes a batch of images and a
    ``torch.Generator`` and returns the images to train on.
    """

    epochs: int
    learning_rate: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 128
    seed: int = 0
    augment: Augment | None = None

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs)
        check_count("batch_size", self.batch_size)
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: expected a number above 0, got {self.learning_rate}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected a number from 0 up to 1, got {self.momentum!r}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay: expected 0 or more, got {self.weight_decay!r}")
        check_seed(self.seed)


@contextmanager
def training(
    model: nn.Module,
    data: Any,
    device: str | torch.device | None,
    progress: bool | Report | None,
) -> Iterator[tuple[nn.Module, Data, Report]]:
    """Give a copy of a network to train, the data, held in memory, and where progress is told."""
    with undisturbed(model, device), torch.inference_mode(False), reporting(progress) as report:
        copy, dtype = prepared(model, device)
        held = Data(data, dtype=dtype, device=device_of(copy))
        held.hold()
        yield copy, held, report


def fit(
    model: nn.Module,
    data: Data,
    loss: Loss,
    schedule: Schedule,
    *,
    after_epoch: Callable[[], None] = lambda: None,
    report: Report = lambda *_: None,
) -> list[dict[str, Any]]:
    """Train a network, a working copy, in place and leave it in evaluation mode.

    Parameters that need no gradient stay as they are. The loss is run with the network in training
    mode, ``after_epoch`` without gradients. Returns for each epoch its number (from 1), the
    ``learning_rate`` at its first step, and the means over its steps of ``loss``, ``cross_entropy``
    and ``penalty``. An error if nothing can be trained or the loss is no longer finite.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("model: no parameter requires a gradient; there is nothing to train")
    optimizer = torch.optim.SGD(
        trained,
        lr=schedule.learning_rate,
        momentum=schedule.momentum,
        weight_decay=schedule.weight_decay,
    )
    labels = torch.cat([batch.labels for batch in data.batches(1024)])
    # An incomplete last batch would give batch norm noisier statistics: it is left out.
    steps = max(1, len(labels) // schedule.batch_size)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * schedule.epochs)
    generator = torch.Generator().manual_seed(schedule.seed)
    torch.manual_seed(schedule.seed)  # dropout; the caller gets its generator back
    history = []
    with giving_logits(model):
        fit_inputs(model, data, data.first(2).images)
        for epoch in range(1, schedule.epochs + 1):
            model.train()
            rate, sums = optimizer.param_groups[0]["lr"], torch.zeros(2, dtype=torch.float64)
            order = torch.randperm(len(labels), generator=generator).split(schedule.batch_size)[
                :steps
            ]
            for step, chosen in enumerate(order):
                images = data.at(chosen)
                if schedule.augment is not None:
                    images = schedule.augment(images, generator)
                with torch.enable_grad():
                    entropy, penalty = loss(images, labels[chosen.to(labels.device)])
                    optimizer.zero_grad()
                    (entropy + penalty).backward()
                found = torch.stack([entropy.detach(), penalty.detach()]).double().cpu()
                if not bool(torch.isfinite(found).all()):
                    raise ValueError(
                        f"learning_rate: the loss is no longer finite in epoch {epoch}, step "
                        f"{step + 1}, at a rate of {rate:.3g}; try a smaller one"
                    )
                optimizer.step()
                cosine.step()
                sums += found
                report((epoch - 1) * steps + step + 1, schedule.epochs * steps, f"epoch {epoch}")
            with torch.no_grad():
                after_epoch()
            entropy_mean, penalty_mean = (sums / steps).tolist()
            history.append(
                {
                    "epoch": epoch,
                    "learning_rate": rate,
                    "loss": entropy_mean + penalty_mean,
                    "cross_entropy": entropy_mean,
                    "penalty": penalty_mean,
                }
            )
    model.eval()
    return history


def cross_entropy(model: nn.Module) -> Loss:
    """Return the loss of plain training."""

    def loss(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = check_logits(model(images), len(images))
        found = functional.cross_entropy(logits, labels)
        return found, found.new_zeros(())

    return loss

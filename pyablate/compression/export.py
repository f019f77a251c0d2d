"""A smaller network on disk, with all that is needed to run it: an exported program."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from pyablate.io.atomic import whole
from pyablate.network.sites import copied


def save_network(model: nn.Module, sample: Tensor, path: str | os.PathLike[str]) -> None:
    """Write a network with its weights as a program of ``torch.export``.

    No code of the network's class is needed to run it, and modules keep their names:
    ``pyablate compare MODEL smaller.pt2`` reads it, and so do the other commands and
    ``torch.export.load``.

    Parameters
    ----------
    model : nn.Module
        Takes a batch of any size; it stays as it is and is exported in evaluation mode.
    sample : Tensor
        A batch of inputs, ``[N, ...]``.
    path : path
        A file called ``*.pt2``; one that is there is replaced, at once.

    Raises
    ------
    ValueError
        Another suffix, or ``torch.export`` cannot capture the network.
    OSError
        The file cannot be written.

    Examples
    --------
    >>> pa.compression.save_network(model, images[:2], "smaller.pt2")
    >>> torch.export.load("smaller.pt2").module()(images[:2]).shape
    torch.Size([2, 10])
    """
    target = Path(path)
    if target.suffix != ".pt2":
        raise ValueError(f"path: expected a file called *.pt2, got {str(path)!r}")
    work = copied(model).eval()
    # A batch of one would be taken for a constant.
    batch = torch.cat([sample[:1], sample[:1]]).detach()
    dynamic = ({0: torch.export.Dim("batch")},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside torch
        try:
            with torch.no_grad():
                program = torch.export.export(work, (batch,), dynamic_shapes=dynamic)
        except Exception as error:  # export fails in as many ways as there are networks
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise ValueError(f"model: torch.export cannot capture it: {reason[0]}") from error
        with whole(target, "path") as fresh:
            torch.export.save(program, fresh)

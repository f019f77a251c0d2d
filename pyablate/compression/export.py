"""Export of a smaller network with its weights as a ``.pt2`` program."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyablate._validation import first_line
from pyablate.data.inputs import arguments
from pyablate.io.atomic import whole
from pyablate.network.exported import quiet_export
from pyablate.network.forward import two_images
from pyablate.network.sites import copied


def save_network(model: nn.Module, sample: Any, path: str | os.PathLike[str]) -> None:
    """Write a network with its weights as a program of ``torch.export``.

    No code of the network's class is needed to run it, and modules keep their names:
    ``pyablate compare MODEL smaller.pt2`` reads it, and so do the other commands and
    ``torch.export.load``.

    Parameters
    ----------
    model : nn.Module
        Takes a batch of any size; it stays as it is and is exported in evaluation mode.
    sample : Tensor, dict or tuple of Tensor
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
    args, keywords = arguments(sample)
    args = tuple(two_images(part).detach() for part in args)
    keywords = {name: two_images(part).detach() for name, part in keywords.items()}
    size = torch.export.Dim("batch")
    dynamic: Any = {name: {0: size} for name in keywords} or tuple({0: size} for _ in args)
    with quiet_export():
        try:
            with torch.no_grad():
                program = torch.export.export(work, args, keywords, dynamic_shapes=dynamic)
        except Exception as error:  # export fails in as many ways as there are networks
            raise ValueError(
                f"model: torch.export cannot capture it: {first_line(error)}"
            ) from error
        with whole(target, "path") as fresh:
            torch.export.save(program, fresh)

"""Latency of several networks, measured in turn in one run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from pyablate._validation import check_count
from pyablate.data.inputs import arguments
from pyablate.network.sites import evaluation


def latency(
    networks: Mapping[str, Any], sample: Any, *, repeats: int = 30, warmup: int = 3
) -> pd.DataFrame:
    """Time a forward pass of several networks in turn, so that all meet the same machine.

    Parameters
    ----------
    networks : mapping of str to nn.Module
        By name, the one to compare with first, such as
        ``{"before": model, "after": removal.model}``. They stay as they are.
    sample : Tensor, dict or tuple of Tensor
        The batch to time, ``[N, ...]``, in their dtype and on their device.
    repeats : int
        Passes of each network.
    warmup : int
        Passes before these, not counted.

    Returns
    -------
    pandas.DataFrame
        One row per network: ``network``, ``milliseconds`` (median of a pass), ``low`` and ``high``
        (quartiles), and ``speedup``: the median over the rounds of the first network's time by
        this one's.

    Raises
    ------
    ValueError, TypeError
        No networks, no modules, or fewer than one repeat.

    Examples
    --------
    >>> times = pa.compression.latency({"before": model, "after": model}, images[:8], repeats=2)
    >>> len(times)
    2
    """
    if not networks:
        raise ValueError("networks: expected at least one, got none")
    for name, network in networks.items():
        if not isinstance(network, nn.Module):
            got = type(network).__name__
            raise TypeError(f"networks: expected an nn.Module as {name!r}, got {got}")
    check_count("repeats", repeats)
    check_count("warmup", warmup, 0)
    seconds = np.empty((repeats, len(networks)))
    for turn in range(-warmup, repeats):
        for place, network in enumerate(networks.values()):
            passed = _timed(network, sample)
            if turn >= 0:
                seconds[turn, place] = passed
    low, middle, high = 1000 * np.quantile(seconds, [0.25, 0.5, 0.75], axis=0)
    return pd.DataFrame(
        {
            "network": list(networks),
            "milliseconds": middle,
            "low": low,
            "high": high,
            "speedup": np.median(seconds[:, :1] / seconds, axis=0),
        }
    )


def _timed(network: nn.Module, sample: Any) -> float:
    args, keywords = arguments(sample)
    device = next(iter([*args, *keywords.values()])).device
    with torch.inference_mode(), evaluation(network):
        _finish(device)
        start = time.perf_counter()
        network(*args, **keywords)
        _finish(device)
        return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

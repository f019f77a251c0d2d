"""The lock of a process around runs, and the lock around torch.export.

torch keeps in global variables what exporting, loading of programs and the precision of matrix
products need. While one thread exports, a module that another thread calls may be traced too, and
the random state that one run restores is the other's as well. So runs in several threads take
turns; each uses every core by itself.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_run = threading.RLock()
_export = threading.RLock()


@contextmanager
def run_lock() -> Iterator[None]:
    """Hold off other runs for the whole of one; a run inside a run of the same thread goes on."""
    with _run:
        yield


@contextmanager
def export_lock() -> Iterator[None]:
    """Hold off other threads while torch exports, or while hooks are on a caller's network.

    Short, and asked for within a run but never the other way round.
    """
    with _export:
        yield


def _begin_anew() -> None:
    """Forget, in a forked process, threads that it does not have."""
    global _run, _export
    _run, _export = threading.RLock(), threading.RLock()


os.register_at_fork(after_in_child=_begin_anew)

"""Ctrl-C inside torch.export: KeyboardInterrupt is raised afterwards where torch swallowed it.

While torch traces a network it runs Python where no exception gets through: in callbacks of weak
references, whose exceptions are printed and dropped, and between calls of its C++, which words them
anew. One Ctrl-C in thirty was lost there, or taken for a network that cannot be captured.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def remembered() -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` at the end if one was raised inside, whatever became of it.

    Signals come in the main thread; in others, and where interrupts are ignored or left to the
    system, nothing happens. A function that it decorates is guarded in the same way.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    raised = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal raised
        try:
            handler(number, frame)
        except KeyboardInterrupt:
            raised = True
            raise

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if raised:
            raise KeyboardInterrupt

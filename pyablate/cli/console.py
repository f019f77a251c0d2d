"""A console that control characters do not get through."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich import console
from rich.segment import Segment

from pyablate.io.sanitize import visible

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderableType


class Console(console.Console):
    """Lets no control characters through but rich's own, whatever was printed."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield what is written, control characters made visible."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield segment._replace(text=visible(segment.text, keep="\n"))

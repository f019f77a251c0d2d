"""A pickle that does something."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class Touch:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)

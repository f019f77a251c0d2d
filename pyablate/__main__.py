"""``python -m pyablate`` is the ``pyablate`` command."""

from pyablate.cli import main

main()

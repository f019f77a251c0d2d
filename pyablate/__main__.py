"""``python -m pyablate`` is the ``pyablate`` command."""

from pyablate.cli.app import main

main()

"""A result as one HTML file that needs nothing else: tables, charts and cards of units and classes.

``AblationResult.report`` and ``pyablate report`` write it. What the page shows is put together in
``numbers.py``, ``examples.py`` and ``activating.py`` (images), ``curves.py`` and
``relations.py`` (attributes); ``page.py`` joins it with the files in ``assets``.
"""

from pyablate.report._write import write_report

__all__ = ["write_report"]

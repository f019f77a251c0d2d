"""Properties of single units that may tell how much they matter."""

from pyablate.attributes.table import attributes

__all__ = ["attributes"]

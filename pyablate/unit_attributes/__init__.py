"""Properties of single units that may tell how much they matter."""

from pyablate.unit_attributes._attributes import attributes

__all__ = ["attributes"]

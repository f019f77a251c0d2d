"""Experiments that ablate more than single units, or compare what single units do."""

from pyablate.experiments.cumulative import Cumulative, cumulative

__all__ = ["Cumulative", "cumulative"]

"""Attribution maps: which pixels speak for a class."""

from .collapsed import collapse as collapse
from .maps import attribution_maps as attribution_maps

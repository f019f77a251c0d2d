"""Attribution maps: which pixels speak for a class."""

from .collapsed import collapse as collapse
from .conditional import conditional_maps as conditional_maps
from .conditional import relmax as relmax
from .maps import attribution_maps as attribution_maps

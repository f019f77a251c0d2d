"""The record of what an ablation found, and how it is stored."""

from .estimate import Estimate as Estimate
from .measures import MEASURES as MEASURES
from .record import Audit as Audit
from .record import Effort as Effort
from .record import Flips as Flips
from .record import Record as Record
from .screening import Screening as Screening
from .store import save as save

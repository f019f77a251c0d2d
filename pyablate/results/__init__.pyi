"""The record of what an ablation found, and how it is stored."""

from .audit import Audit as Audit
from .effort import Effort as Effort
from .estimate import Estimate as Estimate
from .flips import Flips as Flips
from .measures import MEASURES as MEASURES
from .record import Record as Record
from .screening import Screening as Screening
from .store import save as save

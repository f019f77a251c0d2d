"""What an ablation found, and how it is stored."""

from .measures import MEASURES as MEASURES
from .result import AblationResult as AblationResult
from .result import Audit as Audit
from .result import Effort as Effort
from .result import Flips as Flips
from .store import load as load
from .store import save as save

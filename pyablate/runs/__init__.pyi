"""A run from its arguments to its result: checks, plan, blocks, checkpoints, merging."""

from ._ablate import ablate as ablate
from ._merge import merge as merge
from ._plan import Plan as Plan
from ._plan import plan as plan
from .cost_model import Peaks as Peaks
from .run_folder import StoreMismatch as StoreMismatch
from .screened_plan import ScreenedPlan as ScreenedPlan

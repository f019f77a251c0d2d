"""Two networks with the same classes: who suffers, what is preserved, how fast they are."""

from ._compare import Comparison as Comparison
from ._compare import compare as compare
from ._compare import importance_preserved as importance_preserved
from ._compare import surviving as surviving
from ._latency import latency as latency
from .evaluation import Evaluation as Evaluation
from .preservation import Preservation as Preservation
from .preservation import attributions_preserved as attributions_preserved

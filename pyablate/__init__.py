"""Exhaustive unit ablation of neural image classifiers, exact and fast."""

import lazy_loader

# The public names stand in __init__.pyi. Each is imported when it is first asked for, so that
# `import pyablate` and the shell's help need not wait for torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

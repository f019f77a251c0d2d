"""What a run must leave as it was."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a run might disturb, in values that compare with ``==``."""
    parameters = dict(model.named_parameters())
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002  # the global one is meant
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tobytes()
    return {
        "values": {key: value.numpy().tobytes() for key, value in model.state_dict().items()},
        "places": {key: value.data_ptr() for key, value in model.state_dict().items()},
        "dtypes": {key: value.dtype for key, value in model.state_dict().items()},
        "grad flags": {key: value.requires_grad for key, value in parameters.items()},
        "gradients": {
            key: None if value.grad is None else value.grad.numpy().tobytes()
            for key, value in parameters.items()
        },
        "modes": [module.training for module in model.modules()],
        "hooks": [
            [list(hooks.items()) for name, hooks in vars(module).items() if name.endswith("_hooks")]
            for module in model.modules()
        ],
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "torch generator": torch.random.get_rng_state().numpy().tobytes(),
        "numpy generator": str(numpy_state),
        "python generator": random.getstate(),
        "threads": torch.get_num_threads(),
        "gradients enabled": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }

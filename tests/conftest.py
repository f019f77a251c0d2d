"""Settings of the whole test suite."""

import torch

# The networks here are tiny: threads gain nothing, and on a busy machine waiting for one another
# costs them hundreds of times what the work does.
torch.set_num_threads(1)

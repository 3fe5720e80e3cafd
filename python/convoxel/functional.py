"""The names of torch.nn.functional."""

from torch.nn.functional import *  # noqa: F403

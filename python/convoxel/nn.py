"""The names of torch.nn: our layers where we have them, torch's everywhere else."""

from torch.nn import *  # noqa: F403

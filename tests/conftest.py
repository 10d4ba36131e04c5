"""Settings that all tests share."""

import torch

# Two processes of one compute thread each are faster than one of two, and small layers suffer most.
torch.set_num_threads(1)

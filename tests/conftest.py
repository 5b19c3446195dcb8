"""Settings for all tests."""

import sys
from pathlib import Path

import torch

# Scripts there import each other by bare name.
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

# The tensors are tiny: a second thread costs more than it gives, above all on a busy machine.
torch.set_num_threads(1)

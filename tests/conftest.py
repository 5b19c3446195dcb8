"""Settings for all tests."""

import os
import sys
from pathlib import Path

import torch
from hypothesis import settings

# Scripts there import each other by bare name.
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

# The tensors are tiny: a second thread costs more than it gives, above all on a busy machine.
torch.set_num_threads(1)

# The same examples on every run of CI; elsewhere new ones, which may find something new.
settings.register_profile("repeatable", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("repeatable")

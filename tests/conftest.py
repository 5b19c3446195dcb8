"""Settings for all tests."""

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
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


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    before = threading.enumerate()  # of other tests' pipelines, until they are collected
    yield
    assert [thread.name for thread in threading.enumerate() if "offload" in thread.name and thread not in before] == []

"""What torch and OpenMP are told through the environment, before they are loaded.

The command line says it for its process; who imports the library and wants the same sets it before Python starts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

# Read by OpenMP when torch is loaded. Threads that spin while they wait take the processor from those that read
# weights, and lose far more by it than waking up takes; GNU's do so for up to a millisecond, which bridges the gap
# between two layers.
_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"}
# Read by torch with its first tensor: host memory of 2 MiB and more may have huge pages. What a layer makes is new
# memory each time, which then takes one fault and one entry in the page tables where it took 512.
_HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What is to be added to `environment`. Of variables that go together, one of the user's own keeps ours out."""
    groups = (_WAITING, _HUGE_PAGES)
    return {name: value for group in groups if group.keys().isdisjoint(environment) for name, value in group.items()}


def tell_libraries() -> None:
    """Add the settings to the process's environment. Too late once torch is loaded."""
    os.environ.update(settings(os.environ))

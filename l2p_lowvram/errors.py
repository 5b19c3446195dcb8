"""Errors a caller may want to catch, besides ValueError for bad arguments.

    RuntimeError
      NonFiniteError     the model produced NaN or infinity

`offload.errors` holds CheckpointError and BudgetError.
"""

import torch

# What torch says in a bare RuntimeError: of RAM, of a library's workspace, of a kernel's own memory, and of a
# convolution for which every algorithm of cuDNN wanted more memory than there was.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator",
    "_ALLOC_FAILED",
    "CUDA error: out of memory",
    "HIP error: out of memory",
    "unable to find an engine to execute this computation",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, in RAM, on the device, or in one of its libraries."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


class NonFiniteError(RuntimeError):
    """A value in the sample is NaN or infinite; the message names step and phase.

    phase: "text encoder", "transformer", "local decoder", "sampler" or "callback".
    step: index of the denoising step from 0, or None before the first.
    """

    def __init__(self, phase: str, step: int | None = None, steps: int | None = None, hint: str = "") -> None:
        self.phase, self.step = phase, step
        place = f"in the {phase}" if step is None else f"in step {step + 1} of {steps}, in the {phase}"
        super().__init__(f"non-finite value {place}{'; ' + hint if hint else ''}")

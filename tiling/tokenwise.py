"""Per-token functions, a slice of tokens at a time, written in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from tiling.spans import spans

# Slices of the inputs -> the same slices of the outputs.
PerToken = Callable[..., "Tensor | tuple[Tensor, ...]"]


def tokenwise(
    function: PerToken, inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, tile: int, axis: int = -2
) -> None:
    """outputs := function(*inputs), for a function that treats every position along `axis` on its own.

    function gets `tile` positions of every input and returns one tensor per output (a lone tensor for one
    output), which is copied into the output, cast to its dtype. An output may be one of the inputs (a residual
    stream): a slice is read before it is written and no slice reads another. What `function` makes lives for
    one slice. Exact as far as the function's own kernels do not depend on how many positions they get.
    Raises ValueError where the tensors disagree about the length of `axis`.
    """
    lengths = {tensor.shape[axis] for tensor in (*inputs, *outputs)}
    if len(lengths) != 1:
        raise ValueError(f"inputs and outputs must be equally long along axis {axis}, got {sorted(lengths)}")
    for span in spans(lengths.pop(), tile):
        start, length = span.keep_start, span.keep_stop - span.keep_start
        results = function(*(tensor.narrow(axis, start, length) for tensor in inputs))
        results = (results,) if isinstance(results, Tensor) else results
        for output, result in zip(outputs, results, strict=True):
            output.narrow(axis, start, length).copy_(result)
        del results, result  # before the next slice's exist

"""The `quantize` and `dequantize` commands: options, progress, report. `conversion.py` does the work."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .console import print_line, say
from .progress import byte_bar
from .user_input import InputError, describe_os_error, refusals, user_input

if TYPE_CHECKING:  # torch is imported by the commands, not by the command line
    from .comparison import LayerError
    from .conversion import Recipe, Rewriting
    from .export import LayoutStyle

AddCommand = Callable[[str, str, str, Callable[[argparse.Namespace], int]], argparse.ArgumentParser]

SCHEMES = ("row", "tensor", "convrot16", "convrot64", "convrot256", "convrot1024")

QUANTIZE_EPILOG = """\
examples:
  # the 1K original, 19.57 GB, to the layout of the published INT8 file, with the rounding error of each layer
  l2p-lowvram quantize model-1k-merge.safetensors l2p_1k_int8.safetensors --verify
  # a sharded 4K model, floats outside the INT8 layers in BF16, the first layer left alone
  l2p-lowvram quantize PixVerve-4K/ l2p_4k_int8.safetensors --bf16-rest --exclude "layers.0.*"
  # the text encoder: one INT8 file and its config.json
  l2p-lowvram quantize text_encoder/ text_encoder_int8/ --text-encoder

Patterns name linear layers as `layers.3.attention.qkv` (* and ? and [..] as in a shell). Without --include:
attention.qkv, attention.out and feed_forward.w1 to w3 of all `layers`, as in the published file.
"""
DEQUANTIZE_EPILOG = """\
examples:
  l2p-lowvram dequantize l2p_1k_int8.safetensors l2p_1k_bf16.safetensors
  l2p-lowvram dequantize l2p_1k_int8.safetensors l2p_1k_bf16.safetensors --names original
"""


def add_quantize(add_command: AddCommand) -> None:
    parser = add_command("quantize", "make an INT8 file from any L2P checkpoint", QUANTIZE_EPILOG, quantize_command)
    _add_files(parser)
    layers = parser.add_argument_group("layers")
    layers.add_argument(
        "--scheme",
        choices=SCHEMES,
        default="row",
        help="a scale per row (default) or per tensor; convrotN: per row of weights rotated in groups of N",
    )
    layers.add_argument("--include", metavar="PATTERN", nargs="+", help="the linear layers to quantise")
    layers.add_argument("--exclude", metavar="PATTERN", nargs="+", default=(), help="those of them to leave as stored")
    rest = layers.add_mutually_exclusive_group()
    rest.add_argument("--keep-dtype", action="store_true", help="everything else keeps its dtype (default)")
    rest.add_argument("--bf16-rest", action="store_true", help="everything else that is a float becomes BF16")
    parser.add_argument("--verify", action="store_true", help="read both files again and report each layer's error")
    _add_output(parser)


def add_dequantize(add_command: AddCommand) -> None:
    parser = add_command("dequantize", "make a float file from a quantised one", DEQUANTIZE_EPILOG, dequantize_command)
    _add_files(parser)
    parser.add_argument(
        "--names", choices=("comfyui", "original"), default="comfyui", help="spelling of tensor names (default comfyui)"
    )
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), default="bf16", help="of all tensors that are written (default bf16)"
    )
    parser.add_argument("--verify", action="store_true", help="read both files again and compare every value")
    _add_output(parser)


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN", type=_path, help="a .safetensors file, a shard index, or a folder")
    parser.add_argument("output", metavar="OUT", type=_path, help="the .safetensors file to write, or its folder")
    parser.add_argument("--text-encoder", action="store_true", help="IN is a Qwen3 text encoder, not a model")


def _path(text: str) -> Path:
    if not text:  # as an unset variable of the shell leaves it
        raise argparse.ArgumentTypeError("is empty; name a file or folder")
    return Path(text)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file (never IN)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the path")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress and no summary")


def quantize_command(arguments: argparse.Namespace) -> int:
    import torch

    from .conversion import ENCODER_TARGETS, Recipe
    from .export import DEFAULT_TARGETS, LayoutStyle

    default = ENCODER_TARGETS if arguments.text_encoder else DEFAULT_TARGETS
    recipe = Recipe(
        arguments.scheme,
        tuple(arguments.include or default),
        tuple(arguments.exclude),
        torch.bfloat16 if arguments.bf16_rest else None,
    )
    return _rewrite(arguments, recipe, LayoutStyle(marker="both"))


def dequantize_command(arguments: argparse.Namespace) -> int:
    import torch

    from .conversion import Recipe
    from .export import ORIGINAL, LayoutStyle

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[arguments.dtype]
    style = ORIGINAL if arguments.names == "original" else LayoutStyle()
    return _rewrite(arguments, Recipe(None, float_dtype=dtype), style)


@dataclass(frozen=True)
class _Written:
    path: Path
    nbytes: int
    seconds: float
    errors: list[LayerError] | None


def _rewrite(arguments: argparse.Namespace, recipe: Recipe, style: LayoutStyle) -> int:
    """What both commands do: plan, write, verify, report."""
    with ExitStack() as stack:
        with user_input():
            rewriting, target = _planned(arguments, recipe, style, stack)
        with _failures():
            written = _written(arguments, rewriting, target)
        _report(arguments, rewriting, written)
    return 0


def _planned(
    arguments: argparse.Namespace, recipe: Recipe, style: LayoutStyle, stack: ExitStack
) -> tuple[Rewriting, Path]:
    """Everything that can be refused is refused here."""
    from offload import Checkpoint

    from .conversion import Rewriting, read_any_layout
    from .paths import expanded

    checkpoint = stack.enter_context(Checkpoint.open(expanded(arguments.input)))
    layout = read_any_layout(checkpoint, text_encoder=arguments.text_encoder)
    rewriting = stack.enter_context(Rewriting(checkpoint, layout, recipe, style))
    if not rewriting.quantized and recipe.scheme is not None:
        raise InputError("--include and --exclude leave no layer to quantise; see --help for the patterns")
    target = stack.enter_context(_target(expanded(arguments.output)))
    rewriting.check_target(target, overwrite=arguments.overwrite)
    if arguments.text_encoder:
        rewriting.check_config(target, overwrite=arguments.overwrite)
    return rewriting, target


def _written(arguments: argparse.Namespace, rewriting: Rewriting, target: Path) -> _Written:
    errors: list[LayerError] | None = None
    began, seconds = time.perf_counter(), 0.0

    def check(written: Path) -> None:
        nonlocal errors, seconds
        seconds = time.perf_counter() - began
        bars.close()
        if arguments.verify:
            errors = _verified(rewriting, written, target, quiet=arguments.quiet)

    configuration = rewriting.config_beside(target) if arguments.text_encoder else nullcontext()
    with _one_thread(), configuration, ExitStack() as bars:
        told = bars.enter_context(byte_bar(target.name, rewriting.source_bytes, quiet=arguments.quiet))
        nbytes = rewriting.write(target, overwrite=arguments.overwrite, progress=told, check=check)
    return _Written(target, nbytes, seconds, errors)


def _verified(rewriting: Rewriting, written: Path, target: Path, *, quiet: bool) -> list[LayerError]:
    """Compare the file at `written` with its source, before it becomes `target`. Raises CheckpointError."""
    from offload import Checkpoint, CheckpointError, Reader

    from .comparison import ReadableLayout, layer_errors
    from .conversion import RowReader, read_any_layout

    source = ReadableLayout(rewriting.layout, rewriting.reader)
    try:
        with Checkpoint.open(written) as checkpoint, Reader(checkpoint) as reader:
            # What lies beside it yet is not its configuration.
            layout = read_any_layout(checkpoint, text_encoder=rewriting.is_text_encoder, like=rewriting.layout)
            size = sum(source.nbytes for source in layout.sources.values())
            with byte_bar(f"verify {target.name}", size, quiet=quiet) as told:
                return layer_errors(source, ReadableLayout(layout, RowReader(checkpoint, reader)), told)
    except CheckpointError as error:
        if error.path != written:
            raise
        raise CheckpointError(target, f"{error.reason}, and not kept") from error


@contextmanager
def _target(output: Path) -> Iterator[Path]:
    """The file to write: `output`, or `model.safetensors` in that folder, which is made where it is not there yet
    and goes again if the block fails. Raises InputError."""
    if output.suffix == ".safetensors" and not output.is_dir():
        yield output
        return
    if output.suffix and not output.is_dir():
        raise InputError(f"{output}: must end in .safetensors, or be a folder for model.safetensors")
    made = not output.is_dir()
    if made:
        output.mkdir()
    try:
        yield output / "model.safetensors"
    except BaseException:
        if made:
            with suppress(OSError):
                output.rmdir()
        raise


@contextmanager
def _failures() -> Iterator[None]:
    """Around the work: what is wrong with files and disks is reported in one line."""
    try:
        with refusals():
            yield
    except OSError as error:
        raise InputError(describe_os_error(error)) from error


@contextmanager
def _one_thread() -> Iterator[None]:
    """Runs of rows are converted side by side: threads within each would only get in each other's way."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _report(arguments: argparse.Namespace, rewriting: Rewriting, written: _Written) -> None:
    from .comparison import error_table

    if not arguments.quiet:
        say(_summary(rewriting, written))
    if arguments.json:
        print_line(json.dumps(_result(rewriting, written)))
        return
    if written.errors:
        print_line(error_table(written.errors))
    print_line(str(written.path))


def _summary(rewriting: Rewriting, written: _Written) -> str:
    from offload import format_bytes

    rate = rewriting.source_bytes / max(written.seconds, 1e-9)
    sizes = f"{format_bytes(rewriting.source_bytes)} to {format_bytes(written.nbytes)}"
    counts = f"{len(rewriting.entries)} tensors, {len(rewriting.quantized)} quantised layers"
    lines = [f"warning: {warning}" for warning in rewriting.warnings]
    lines.append(f"{sizes} in {written.seconds:.1f} s, {format_bytes(int(rate))}/s; {counts}")
    if written.errors is not None:
        lines.append("verified: what was written is what was computed")
    if rewriting.is_text_encoder:
        lines.append("the tokenizer does not change: go on using the tokenizer.json of the source")
    return "\n".join(lines)


def _result(rewriting: Rewriting, written: _Written) -> dict[str, object]:
    from .comparison import largest_error

    verify = None
    if written.errors is not None:
        largest = {name: value for name, value in asdict(largest_error(written.errors)).items() if name != "layer"}
        verify = {"largest": largest, "layers": [asdict(error) for error in written.errors]}
    return {
        "file": str(written.path),
        "bytes": written.nbytes,
        "tensors": len(rewriting.entries),
        "quantized_layers": len(rewriting.quantized),
        "seconds": round(written.seconds, 3),
        "read_bytes": rewriting.source_bytes,
        "conversion": rewriting.provenance,
        "warnings": rewriting.warnings,
        "verify": verify,
    }

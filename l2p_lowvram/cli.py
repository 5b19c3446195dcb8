"""The command line: options and environment in, one function per command, errors out as exit codes.

    0     done
    2     an option, a file, a size or a budget that cannot be used (`user_input` says what counts), or a file
          that `inspect` refuses
    3     the model produced NaN or infinity
    4     out of memory
    5     more memory was held than the budget allows (`generate --strict-budget`)
    129   the terminal was closed (SIGHUP)
    130   Ctrl-C
    143   asked to end (SIGTERM)

Anything else keeps its traceback and exits with 1. torch is imported by the commands, not here, so that
`--help` is quick.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from . import __version__
from .choices import AUTO, COMPUTE_CHOICES, DTYPE_CHOICES, IO_CHOICES
from .config import MAX_COUNT
from .console import lost_output, open_standard_descriptors, print_line, say
from .library_settings import tell_libraries
from .quantize import add_dequantize, add_quantize
from .user_input import InputError, one_line, user_input

PROGRAM = "l2p-lowvram"
EXIT_BUG, EXIT_INPUT, EXIT_NON_FINITE, EXIT_MEMORY, EXIT_INTERRUPTED = 1, 2, 3, 4, 130
MODEL_VARIABLE, CACHE_VARIABLE = "L2P_MODEL", "L2P_CACHE_DIR"

EXIT_CODES = """\
exit codes: 0 done; 2 bad option, file, size or budget; 3 NaN or infinity in the sample; 4 out of memory;
            5 budget broken (--strict-budget); 130 Ctrl-C, 129 and 143 other signals"""

GENERATE_EPILOG = f"""\
examples:
  # the embedded demo model
  {PROGRAM} generate -p "a large red circle on a blue background, left" -o circle.png
  # a model file with its text encoder and tokenizer, four pictures from one seed on
  {PROGRAM} generate -m l2p_int8.safetensors --text-encoder qwen3/ --tokenizer qwen3/tokenizer.json \\
      -p "a lighthouse at dusk" --seed 42 --count 4 -o "dusk_{{seed}}.png"
  # prompt from a pipe, other size, WebP, result as JSON
  echo "a fox in the snow" | {PROGRAM} generate -m model/ -p - -W 768 -H 1024 -o fox.webp --json
  # start from a picture and watch the estimate of each step
  {PROGRAM} generate -m model/ -p "as an oil painting" -i photo.jpg --strength 0.5 --preview now.png -o a.png

environment:
  {MODEL_VARIABLE}      model used without --model
  {CACHE_VARIABLE}  folder for prompt features instead of the user's cache folder

{EXIT_CODES}"""

PLAN_EPILOG = f"""\
examples:
  {PROGRAM} plan -m l2p_int8.safetensors -W 4096 -H 4096 --vram 6GiB
  {PROGRAM} plan -m l2p_int8.safetensors -W 1024 -H 1024 --device-profile rtx4060-laptop-8g --json

{EXIT_CODES} (2 also where it does not fit)"""

INSPECT_EPILOG = f"""\
examples:
  {PROGRAM} inspect l2p_int8.safetensors
  {PROGRAM} inspect model/ --json

{EXIT_CODES} (2 also for a file that is refused)"""


# Arguments that name files or folders.
_NAMES = ("model", "text_encoder", "tokenizer", "prompt_file", "image", "output", "preview", "report", "file")


def entry() -> NoReturn:
    """The console script."""
    open_standard_descriptors()
    tell_libraries()
    signal.signal(signal.SIGTERM, _terminated)
    # A terminal that was closed; not under nohup, which has it ignored.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, _terminated)
    sys.exit(main())


def _terminated(number: int, frame: object) -> NoReturn:
    """Ends like any error, so that nothing half-written is left."""
    sys.exit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. argv: without the program name; None for the process's own. Returns the exit code."""
    lost_output()  # of an earlier command in this process
    try:
        arguments = build_parser().parse_args(argv)
        _refuse_empty_names(arguments)
        # Before torch, which imports it, too, and throws away what a signal raises meanwhile.
        importlib.import_module("numpy")
        command: Callable[[argparse.Namespace], int] = arguments.command
        code = command(arguments)
        return EXIT_INPUT if code == 0 and lost_output() else code
    except InputError as error:
        return _fail(one_line(error), EXIT_INPUT)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except (RuntimeError, MemoryError) as error:
        from .errors import NonFiniteError, is_out_of_memory

        if isinstance(error, NonFiniteError):
            return _fail(one_line(error), EXIT_NON_FINITE)
        if is_out_of_memory(error):
            return _fail("out of memory; try a smaller --width and --height, or another --device", EXIT_MEMORY)
        raise
    except SystemExit as stop:  # argparse after --help and --version
        return int(stop.code or 0)


def _refuse_empty_names(arguments: argparse.Namespace) -> None:
    """As an unset variable of the shell leaves them: taken for the folder at hand, or for no option at all."""
    for name in _NAMES:
        if getattr(arguments, name, None) == "":
            said = "FILE" if name == "file" else f"--{name.replace('_', '-')}"
            raise InputError(f"{said} is empty; name a file or folder")


def generate_command(arguments: argparse.Namespace) -> int:
    from .generate import generate

    model = arguments.model or os.environ.get(MODEL_VARIABLE) or None
    cache_folder = os.environ.get(CACHE_VARIABLE)
    prompt_cache: bool | Path | None = Path(cache_folder) / "prompts" if cache_folder else True
    if arguments.no_prompt_cache:
        prompt_cache = None
    return generate(arguments, model=model, prompt_cache=prompt_cache)


def inspect_command(arguments: argparse.Namespace) -> int:
    from .inspection import inspect_model

    with user_input():
        report = inspect_model(arguments.file)
    print_line(report.as_json() if arguments.json else report.as_text())
    return 0 if report.accepted else EXIT_INPUT


def selftest_command(arguments: argparse.Namespace) -> int:
    from .selftest import Check, run_checks

    def tell(check: Check) -> None:
        verdict = "skipped" if check.difference is None else "equal" if check.passed else "DIFFERENT"
        if not arguments.json:
            print_line(f"{verdict:9} {check.device}: {check.what}{'  ' + check.note if check.note else ''}")

    checks = run_checks(tell)
    if arguments.json:
        print_line(json.dumps([{**asdict(check), "passed": check.passed} for check in checks], indent=2))
    return 0 if all(check.passed for check in checks) else EXIT_BUG


def plan_command(arguments: argparse.Namespace) -> int:
    from .planning import make_plan, plan_text
    from .profiles import choose_profile
    from .repository import locate_model
    from .streaming import MemoryOptions

    model = arguments.model or os.environ.get(MODEL_VARIABLE) or "demo"
    with user_input():
        profile = choose_profile(arguments.device_profile, vram=arguments.vram, dtype=arguments.dtype)
        options = MemoryOptions(arguments.vram, arguments.ram, arguments.pin, arguments.io, arguments.slots)
        files = locate_model(model, text_encoder=arguments.text_encoder)
        request = {name: getattr(arguments, name) for name in ("width", "height", "steps", "cfg_scale")}
        plan = make_plan(files, profile, options, {**request, "pictures": arguments.count}, arguments.compute)
    print_line(plan.as_json() if arguments.json else plan_text(plan))
    return 0 if plan.fits else EXIT_INPUT


def profile_command(arguments: argparse.Namespace) -> int:
    from .order import check_free
    from .paths import belongs_to, expanded, parts_of
    from .profiles import as_json, as_text, measure_here

    with user_input():
        output = None if arguments.output is None else Path(arguments.output)
        measured = () if arguments.model is None else parts_of(expanded(arguments.model))
        if output is not None:
            if any(belongs_to(output, part) for part in measured):
                raise InputError(f"{output}: belongs to the --model that is to be measured; name another file")
            check_free(output, "--output", overwrite=arguments.overwrite)
        profile = measure_here(arguments.device, arguments.dtype, arguments.model)
        if output is not None:
            from .whole_file import whole_file

            with whole_file(output, overwrite=arguments.overwrite) as file:
                file.write(f"{as_json(profile)}\n".encode())
    print_line(as_json(profile) if arguments.json else as_text(profile))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Pictures from text with L2P in INT8, on small GPUs and CPUs.",
        epilog=f"{PROGRAM} COMMAND --help shows options and examples\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=f"{PROGRAM} {__version__}", help="print the version and exit"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_inspect(commands)
    _add_selftest(commands)
    _add_plan(commands)
    _add_profile(commands)
    for add in (add_quantize, add_dequantize):
        add(lambda name, text, epilog, run: _command(commands, name, text, f"{epilog}\n{EXIT_CODES}", run))
    return parser


def _add_generate(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _command(commands, "generate", "make pictures from a prompt", GENERATE_EPILOG, generate_command)
    _add_model(parser)
    _add_memory(parser)
    _add_prompt(parser)
    _add_sampling(parser)
    _add_output(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument(
        "-m", "--model", metavar="MODEL", help="a .safetensors file, a model folder, or demo (the default)"
    )
    model.add_argument("--text-encoder", metavar="PATH", help="file or folder; default: the model folder's")
    model.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json or its folder; default: likewise")
    model.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
    model.add_argument(
        "--dtype",
        default="auto",
        choices=(AUTO, *DTYPE_CHOICES),
        help="auto: bf16 where the device computes it natively, else fp16 on cards that are fast in it, else fp32",
    )
    model.add_argument(
        "--bf16-timestep", action="store_true", help="round the timestep to bf16 as the original code does"
    )
    _add_compute(
        model,
        "auto: int8 where it is measured to be clearly faster, on CPUs with VNNI unless it is measured to take a "
        "quarter longer or more",
    )


def _add_prompt(parser: argparse.ArgumentParser) -> None:
    text = parser.add_argument_group("prompt")
    prompts = text.add_mutually_exclusive_group(required=True)
    prompts.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt; - reads it from standard input")
    prompts.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file in UTF-8")
    text.add_argument("-n", "--negative-prompt", metavar="TEXT", default="", help="what guidance leads away from")
    text.add_argument("--no-prompt-cache", action="store_true", help="neither read nor keep prompt features on disk")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    sampling = parser.add_argument_group("sampling (defaults come from the model)")
    sampling.add_argument("-W", "--width", metavar="PIXELS", type=_count, help="default: --image's or the model's")
    sampling.add_argument("-H", "--height", metavar="PIXELS", type=_count, help="likewise")
    sampling.add_argument("--steps", metavar="N", type=_count, help="denoising steps")
    sampling.add_argument(
        "--cfg-scale",
        metavar="C",
        type=_number,
        help="guidance, negative + C * (positive - negative); 1 turns it off and halves the time; "
        "diffusers' guidance_scale + 1",
    )
    sampling.add_argument("--shift", metavar="S", type=_number, help="more steps at high noise for S > 1")
    sampling.add_argument(
        "--sigmas",
        metavar="SIGMA",
        nargs="+",
        type=_number,
        help="own noise levels instead of --steps and --shift, descending from at most 1; a final 0 is added",
    )
    sampling.add_argument(
        "--seed", metavar="S", nargs="+", type=int, help="one picture each; -1 or none: a random one, printed"
    )
    sampling.add_argument(
        "--count", metavar="N", type=_count, default=1, help="pictures from seed, seed + 1, ... (default 1)"
    )
    sampling.add_argument(
        "--noise-device",
        default="cpu",
        choices=("cpu", "device"),
        help="where noise is drawn; cpu (default) gives the same picture for a seed on every machine",
    )
    sampling.add_argument("-i", "--image", metavar="FILE", help="start from this picture")
    sampling.add_argument(
        "--strength",
        metavar="X",
        type=_number,
        help="how far to depart from --image: near 0 hardly, 1 entirely (default 0.6)",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        default="l2p_{seed}.png",
        help="PNG, JPEG or WebP by suffix; {seed} and {index} (from 0) are filled in (default %(default)s)",
    )
    output.add_argument("--overwrite", action="store_true", help="replace existing files")
    output.add_argument("--quality", metavar="Q", type=_quality, help="1 to 100 for JPEG and WebP (default 95)")
    output.add_argument("--no-metadata", action="store_true", help="embed no prompt and settings")
    output.add_argument(
        "--preview",
        metavar="PATH",
        help="save the estimate of each step: to one file that is replaced (PATH ends in .png, .jpg, .webp), "
        "or to {seed}_step_{step}.png in a folder",
    )
    output.add_argument("--json", action="store_true", help="print one JSON object instead of the paths")
    output.add_argument(
        "--strict-budget", action="store_true", help="exit with 5 if more memory was held than --ram or --vram allows"
    )
    output.add_argument(
        "--report", metavar="FILE", help="write the same JSON, with time, bytes and memory of each phase, to a file"
    )
    output.add_argument("-q", "--quiet", action="store_true", help="no progress and no summary, only warnings")


def _add_compute(group: argparse._ActionsContainer, auto: str) -> None:
    group.add_argument(
        "--compute",
        default="auto",
        choices=COMPUTE_CHOICES,
        help=f"INT8 weights as floats (dequant), or multiplied with INT8 activations (int8: faster on some devices, "
        f"another and slightly worse picture for a seed); {auto}",
    )


def _add_memory(parser: argparse.ArgumentParser) -> None:
    memory = parser.add_argument_group("memory (sizes such as 6GiB or 500MB; defaults from what is free)")
    memory.add_argument(
        "--vram",
        metavar="SIZE",
        type=_size,
        help="device memory: weights, activations, the device's own share; not on the CPU, whose memory is --ram",
    )
    memory.add_argument(
        "--ram",
        metavar="SIZE",
        type=_size,
        help="host memory; on the CPU everything, elsewhere pinned and cached weights",
    )
    memory.add_argument("--pin", metavar="SIZE", type=_size, help="the most of --ram that is page-locked; 0 for none")
    memory.add_argument(
        "--io",
        default="auto",
        choices=IO_CHOICES,
        help="how weights are read: through the page cache, past it, or mapped; auto (default) by a short probe",
    )
    memory.add_argument(
        "--slots", metavar="N", type=_count, help="blocks in the ring, at least 2 (default 2, or 3 from the disk)"
    )


def _add_inspect(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _command(
        commands,
        "inspect",
        "say what a model file holds, reading its header only",
        INSPECT_EPILOG,
        inspect_command,
    )
    parser.add_argument("file", metavar="FILE", help="a .safetensors file, a shard index, or a model folder")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_selftest(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _command(
        commands,
        "selftest",
        "compare the streamed demo model with the whole one, bit for bit, on every device",
        f"{EXIT_CODES} (1 also for a difference)",
        selftest_command,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_plan(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _command(
        commands,
        "plan",
        "say what a run will hold, move and take, without running it",
        PLAN_EPILOG,
        plan_command,
    )
    parser.add_argument("-m", "--model", metavar="MODEL", help="as for generate; its headers are read, not its weights")
    parser.add_argument("--text-encoder", metavar="PATH", help="file or folder; default: the model folder's")
    parser.add_argument("-W", "--width", metavar="PIXELS", type=_count, help="default: the model's")
    parser.add_argument("-H", "--height", metavar="PIXELS", type=_count, help="likewise")
    parser.add_argument("--steps", metavar="N", type=_count, help="denoising steps")
    parser.add_argument("--cfg-scale", metavar="C", type=_number, help="1 for no guidance: half the work")
    parser.add_argument("--count", metavar="N", type=_count, default=1, help="pictures of one call (default 1)")
    parser.add_argument(
        "--device-profile",
        metavar="NAME",
        help="a card's name (rtx3060-12g, rtx4060-laptop-8g, rtx4090, ...) or a .json file that profile wrote; "
        "default: a slow card where --vram is given, else this machine",
    )
    parser.add_argument("--dtype", default="auto", choices=(AUTO, *DTYPE_CHOICES), help="auto: as the device computes")
    _add_compute(parser, "auto: as int8 wherever a run may take it, which takes more memory")
    _add_memory(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_profile(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _command(
        commands,
        "profile",
        "measure this machine, for plan --device-profile",
        f"examples:\n  {PROGRAM} profile -m l2p_int8.safetensors -o here.json\n\n{EXIT_CODES}",
        profile_command,
    )
    parser.add_argument("-m", "--model", metavar="FILE", help="what the disk's rate is measured on; default: none is")
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", default="auto", choices=(AUTO, *DTYPE_CHOICES), help="auto: as generate chooses it")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the profile as JSON, for --device-profile FILE")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _command(
    commands: argparse._SubParsersAction[_Parser],
    name: str,
    summary: str,
    epilog: str,
    function: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(command=function)
    return parser


class _Parser(argparse.ArgumentParser):
    """Reports bad options like every other bad input: in one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def _count(text: str) -> int:
    return _within(int(text), 1, MAX_COUNT)


def _quality(text: str) -> int:
    return _within(int(text), 1, 100)


def _within(value: int, least: int, most: int) -> int:
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}, got {value}")
    return value


def _size(text: str) -> int:
    from offload.sizes import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return value


# argparse names the type in its own message: "invalid whole number value: 'x'".
_count.__name__ = _quality.__name__ = "whole number"
_number.__name__ = "number"


def _fail(message: str, code: int) -> int:
    say(f"error: {message}" if code != EXIT_INTERRUPTED else message)
    return code

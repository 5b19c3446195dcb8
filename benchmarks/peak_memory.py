"""Peak device memory of the real pipeline at full size, without a card: `python benchmarks/peak_memory.py`.

    python benchmarks/peak_memory.py                                     the sizes with a target, in about a minute
    python benchmarks/peak_memory.py --family 4k -W 4096 -H 4096         one size
    python benchmarks/peak_memory.py --family 1k --vram 6GiB --details   what a budget of 6 GiB comes to

Published INT8 layout, every block streamed, both CFG branches, one step; slots, RoPE tables, captions and the plan's
workspace allowance are in, the CUDA context is not. "live" are the tensors alone, "peak" what torch's allocator
reserves for them, both counted on fake tensors while the pipeline runs (`fake_cuda.py` says what is modelled and
what not); "predicted" is the plan's promise. The allocator may reserve no more than the budget, as on a card.
Without --vram a row gets slices that fit its target and the smallest budget that keeps them, so that nothing is
resident. "decoder" is another run's: the local decoder's arithmetic relative to the untiled one, as planned for 8 GiB.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fake_cuda import ARCHES
from fake_run import Account, Request, account, decoder_arithmetic, streamed_budget, write_sparse_checkpoint

from l2p_lowvram.devices import DTYPES
from l2p_lowvram.estimates import CONTEXT_BYTES, WORKSPACE_BYTES
from l2p_lowvram.families import PUBLISHED
from offload import BudgetError, format_bytes, parse_bytes

GIB = 1 << 30
# Of the card whose plan the decoder's arithmetic is told for.
_CARD_BYTES = 8 * GIB
_NO_LIMIT = 1 << 60


@dataclass(frozen=True)
class Case:
    """A row of the table. target: bytes that its peak should stay within, the context apart; None: none was set."""

    family: str
    width: int
    height: int
    target: int | None = None


CASES = (
    Case("1k", 1024, 1024, GIB * 3 // 4),
    Case("1k", 3840, 2160, GIB * 16 // 10),
    Case("1k", 4096, 4096, GIB * 5 // 2),
    Case("4k", 4096, 4096, GIB),
    Case("8k", 8192, 8192, 2 * GIB),
    Case("10k", 10240, 10240, 3 * GIB),
)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--family", choices=PUBLISHED, help="one family only (default: all that have a target)")
    result.add_argument("-W", "--width", type=int, help="pixels (default: the sizes with a target)")
    result.add_argument("-H", "--height", type=int, help="pixels")
    result.add_argument("--vram", type=parse_bytes, metavar="SIZE", help="budget, context included, filled as by a run")
    result.add_argument("--arch", choices=ARCHES, default="sm86", help="card, for its attention kernel (default sm86)")
    result.add_argument("--dtype", choices=DTYPES, default="bf16", help="of activations (default bf16)")
    result.add_argument("--steps", type=int, default=1, help="denoising steps (default 1; more change nothing)")
    result.add_argument("--unguided", action="store_true", help="one branch, as with --cfg-scale 1")
    result.add_argument("--expandable", action="store_true", help="allocator with expandable_segments:True")
    result.add_argument("--unlimited", action="store_true", help="let the allocator reserve more than the budget")
    result.add_argument("--everything", action="store_true", help="make repetitions too (minutes)")
    result.add_argument("--details", action="store_true", help="also what is alive at the peak, and host waits")
    result.add_argument("--json", action="store_true", help="print a list of rows as JSON")
    return result


def cases(options: argparse.Namespace) -> list[Case]:
    """The rows asked for."""
    if options.width is None and options.height is None:
        return [case for case in CASES if options.family in (None, case.family)]
    defaults = PUBLISHED[options.family or "1k"].defaults
    size = (options.width or options.height or defaults.width, options.height or options.width or defaults.height)
    case = Case(options.family or "1k", *size)
    known = {(known.family, known.width, known.height): known for known in CASES}
    return [known.get((case.family, case.width, case.height), case)]


def accounts(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """A row each."""
    for case in cases(options):
        model = folder / f"{case.family}.safetensors"
        if not model.exists():
            write_sparse_checkpoint(model, PUBLISHED[case.family])
        try:
            request = request_for(case, model, options)
            found = one_account(model, request, options)
        except BudgetError as error:
            yield refusal(case, error, options)
        else:
            arithmetic = decoder_arithmetic(model, request, ARCHES[options.arch], _CARD_BYTES)
            yield row(case, found, arithmetic, options)


def one_account(model: Path, request: Request, options: argparse.Namespace) -> Account:
    """Raises BudgetError."""
    limit = _NO_LIMIT if options.unlimited else None
    return account(
        model,
        request,
        ARCHES[options.arch],
        limit_bytes=limit,
        expandable=options.expandable,
        repetitions=options.everything,
    )


def request_for(case: Case, model: Path, options: argparse.Namespace) -> Request:
    """Raises BudgetError."""
    dtype = DTYPES[options.dtype]
    request = Request(case.width, case.height, not options.unguided, steps=options.steps, dtype=dtype)
    vram = options.vram
    if vram is None:
        within = {} if case.target is None else {"within": case.target + CONTEXT_BYTES}
        vram = streamed_budget(model, request, ARCHES[options.arch], **within)
    return Request(case.width, case.height, not options.unguided, steps=options.steps, dtype=dtype, vram=vram)


def _head(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    size = {"family": case.family, "width": case.width, "height": case.height}
    return size | {"arch": options.arch, "target_bytes": case.target}


def refusal(case: Case, error: BudgetError, options: argparse.Namespace) -> dict[str, Any]:
    return _head(case, options) | {"fits": False, "reason": str(error)}


def row(case: Case, found: Account, arithmetic: float, options: argparse.Namespace) -> dict[str, Any]:
    """All bytes without the CUDA context. arithmetic: `decoder_arithmetic`."""
    return _head(case, options) | {
        "fits": True,
        "peak_bytes": found.peak,
        "live_bytes": found.live,
        "predicted_bytes": found.predicted,
        "decoder_arithmetic": arithmetic,
        "workspace_bytes": WORKSPACE_BYTES,
        "ring_bytes": found.plan.ring_bytes,
        "slices": found.slices,
        "peak_at": found.peak_at,
        "reserved_at": found.reserved_at,
        "attention": sorted(found.kernels),
        "flushes": found.flushes,
        "notices": list(found.notices),
        "alive_at_peak": [[site, nbytes] for nbytes, site in found.alive[:12]],
        "host_syncs": found.host_syncs,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """For people: a line of sizes per row, the line that made the peak below it."""
    lines = [f"{'family and size':18} {'predicted':>10} {'live':>10} {'peak':>10} {'target':>10} {'decoder':>8}"]
    for entry in rows:
        size = f"{entry['family']} {entry['width']}x{entry['height']}"
        if not entry["fits"]:
            lines.append(f"{size:18} does not fit: {entry['reason']}")
            continue
        keys = ("predicted_bytes", "live_bytes", "peak_bytes", "target_bytes")
        cells = [format_bytes(entry[key]) if entry[key] else "-" for key in keys]
        met = (
            "" if not entry["target_bytes"] else "  met" if entry["peak_bytes"] <= entry["target_bytes"] else "  MISSED"
        )
        arithmetic = f" {entry['decoder_arithmetic']:>8.3f}"
        lines.append(f"{size:18} " + " ".join(f"{cell:>10}" for cell in cells) + arithmetic + met)
        lines.append(f"    {entry['slices']}; attention: {', '.join(entry['attention'])}")
        lines.append(f"    peak of tensors: {entry['peak_at']}")
        lines += [f"    {notice}" for notice in entry["notices"]]
    return "\n".join(lines)


def details(entry: dict[str, Any]) -> str:
    """What is alive at the peak, and which lines make the host wait."""
    alive = [f"    {format_bytes(nbytes):>10}  {site}" for site, nbytes in entry.get("alive_at_peak", ())]
    waits = sorted(entry.get("host_syncs", {}).items(), key=lambda item: -item[1])
    lines = [f"{entry['family']} {entry['width']}x{entry['height']}: alive at the peak", *alive]
    return "\n".join([*lines, "  host waits for the device", *(f"    {count:10}  {line}" for line, count in waits)])


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows = list(accounts(options, Path(folder)))
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(table(rows))
    if options.details:
        print("\n".join(details(entry) for entry in rows))


if __name__ == "__main__":
    main()

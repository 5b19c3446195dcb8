"""Where each block's weights live for a run: decided once, from numbers alone.

    device    on the device for the whole run
    pinned    in page-locked host memory, copied over the link at every visit
    cached    left in the page cache by reading it there, read again from memory at every visit
    disk      read from the disk at every visit

Every block that is not on the device passes through a ring of equal slots. A block larger than a slot
takes several neighbouring ones, so two refiners of twice the size do not double every slot: while one of
them is visited the ring holds fewer blocks ahead, and the stall this costs is part of the prediction.
The slot size is chosen among the sizes of the blocks.

A cyclic scan through a least-recently-used cache hits nothing, so the blocks kept in RAM are a fixed set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from types import MappingProxyType

from offload.blocks import aligned
from offload.errors import BudgetError
from offload.sizes import format_bytes

_STEPS_TO_STEADY_STATE = 3
# As many slots as the usual block may take: with more, a ring is a long list of small slots.
_SLOTS_OF_A_BLOCK = 6
# What bounds the time of planning, for models of hundreds of blocks or sizes: sizes of slots and numbers of blocks that
# are tried, and visits that predictions play through in all, a few seconds of them. Most models stay far below.
_MOST_SIZES = 16
_MOST_COUNTS = 128
_MOST_VISITS = 4_000_000
_LEAST_CHOICES = 8
# Numbers of slots that are tried where none is asked for: 2 to twice 3.
_DEFAULT_RINGS = 5


class Tier(str, Enum):
    DEVICE = "device"
    PINNED = "pinned"
    CACHED = "cached"
    DISK = "disk"


@dataclass(frozen=True)
class BlockCost:
    """What the planner knows of a block: the bytes of its slot, the seconds one visit computes, visits per step.

    A block of 0 visits per step is visited outside the steps, if at all: it is streamed and never kept. Neither is one
    that may not stay: of a phase whose blocks are visited once in all, a plan for one visit each hides their reading.
    """

    name: str
    nbytes: int
    seconds: float
    visits: int = 1
    may_stay: bool = True

    @property
    def is_worth_keeping(self) -> bool:
        return self.may_stay and self.visits > 0


@dataclass(frozen=True)
class Rates:
    """Bytes per second of reading from the disk, from the page cache, and of the link to the device.

    `link` is None where the device computes in host memory: there is nothing to cross.
    """

    disk: float
    cached: float = math.inf
    link: float | None = None

    def source(self, tier: Tier) -> float:
        """What a block of a tier is read at, before it crosses the link; infinite where nothing is read."""
        return {Tier.DISK: self.disk, Tier.CACHED: self.cached}.get(tier, math.inf)

    def across(self) -> float:
        return math.inf if self.link is None else self.link


@dataclass(frozen=True)
class Budget:
    """What may be held, in bytes.

    device: all of it, `activations` (the peak beside the weights) and whatever else is `reserved` included.
    host: pinned, staging and cached bytes together; unused where `Rates.link` is None, since there the
    device's memory is the host's. pinned: the most that may be page-locked.
    staging: the pinned ring that blocks from disk and cache pass through.
    name: what a refusal calls the device's budget.
    """

    device: int
    activations: int = 0
    reserved: int = 0
    host: int = 0
    pinned: int = 0
    staging: int = 0
    name: str = "device budget"

    @property
    def weights(self) -> int:
        """Device bytes left for resident blocks and the ring; negative where even the rest does not fit."""
        return self.device - self.activations - self.reserved


@dataclass(frozen=True)
class ResidencyPlan:
    """Tier of every block, the ring, and what a step is predicted to cost.

    device_bytes and host_bytes are what the plan takes of each budget, all included.
    stall_seconds: predicted wait of the compute for weights, per step in the steady state.
    notes: what the planner had to give up.
    """

    tiers: Mapping[str, Tier]
    slots: int
    slot_bytes: int
    staging_bytes: int
    device_bytes: int
    host_bytes: int
    compute_seconds: float
    stall_seconds: float
    streamed_bytes: int
    notes: tuple[str, ...] = ()

    def count(self, tier: Tier) -> int:
        return sum(found is tier for found in self.tiers.values())

    @property
    def ring_bytes(self) -> int:
        return self.slots * self.slot_bytes


def plan_residency(
    blocks: Sequence[BlockCost], rates: Rates, budget: Budget, *, slots: int | None = None
) -> ResidencyPlan:
    """The plan with the least predicted stall that keeps within the budget; of those, the fewest device bytes.

    blocks: in the order of their visits. slots: of the ring, each with room for the usual block; by default at least
    3 where blocks come from the disk, at least 2 otherwise, more where that saves stall, and what there is room for
    where memory is short.
    Where no link has to be crossed, spare memory is the only RAM there is and holds as many blocks as fit
    without taking the ring's room to hide reads; elsewhere spare device memory goes to blocks whose copy
    cannot hide, spread evenly over the step.
    Pure and deterministic. Raises BudgetError with the numbers and the smallest budget that works.
    """
    if len({block.name for block in blocks}) != len(blocks):
        raise ValueError("blocks must have different names")
    if slots is not None and slots < 2:
        raise ValueError(f"the ring needs at least 2 slots, got {slots}")
    _require_device(blocks, budget)
    _require_staging(blocks, rates, budget)
    return _best_plan(tuple(blocks), rates, budget, slots)


# A run asks for the same plan a few times: whether it fits, to tell of it, and to open the ring.
@lru_cache(maxsize=64)
def _best_plan(blocks: tuple[BlockCost, ...], rates: Rates, budget: Budget, slots: int | None) -> ResidencyPlan:
    # As `_rank` prefers them, so that most cannot be better than the best so far, and are not played through.
    residents = sorted(
        _resident_choices(blocks, budget.weights, _most_choices(blocks, slots)),
        key=lambda resident: _held_bytes(blocks, resident),
        reverse=rates.link is None,
    )
    best: ResidencyPlan | None = None
    for resident in residents:
        if best is not None and not best.notes and _least_rank(blocks, rates, budget, resident) > _rank(best, rates):
            continue
        plan = _complete(blocks, rates, budget, resident, slots)
        # A plan that had to give something up loses to any that did not: slots beyond the pair absorb jitter,
        # which no prediction sees.
        if plan is not None and (
            best is None or (len(plan.notes), _rank(plan, rates)) < (len(best.notes), _rank(best, rates))
        ):
            best = plan
    assert best is not None, "some plan fits, or the budget was refused"
    return best


def _held_bytes(blocks: Sequence[BlockCost], resident: frozenset[str]) -> int:
    return sum(block.nbytes for block in blocks if block.name in resident)


def _most_choices(blocks: Sequence[BlockCost], slots: int | None) -> int:
    """Sets of resident blocks to try, so that planning ends in seconds whatever the model."""
    visits = _STEPS_TO_STEADY_STATE * sum(block.visits for block in blocks)
    rings = len(_slot_sizes(blocks)) * (slots or _DEFAULT_RINGS)
    return max(_MOST_VISITS // max(rings * visits, 1), _LEAST_CHOICES)


def _rank(plan: ResidencyPlan, rates: Rates) -> tuple[float, int, int]:
    stall = _share(plan.stall_seconds, plan.compute_seconds)
    if rates.link is None:
        return (stall, plan.streamed_bytes, plan.device_bytes)
    return (stall, plan.device_bytes, plan.streamed_bytes)


def _least_rank(
    blocks: Sequence[BlockCost], rates: Rates, budget: Budget, resident: frozenset[str]
) -> tuple[float, int, int]:
    """What no plan with these residents is ranked below: computing and moving can do no better than overlap."""
    streamed = [block for block in blocks if block.name not in resident]
    moved = sum(block.nbytes * block.visits for block in streamed)
    computing = sum(block.seconds * block.visits for block in blocks)
    moving = moved / (rates.disk if rates.link is None else rates.link)
    # One step of the rounding less, for sums of floats in another order.
    stall = max(_share(max(moving - computing, 0.0), computing) - 1e-4, 0.0)
    held = budget.activations + budget.reserved + _held_bytes(blocks, resident)
    return (stall, moved, held) if rates.link is None else (stall, held, moved)


def _share(stall: float, computing: float) -> float:
    """Of the step. Rounded to a ten-thousandth of it: less is no reason to hold memory."""
    return round(stall / max(computing + stall, 1e-12), 4)


def _require_device(blocks: Sequence[BlockCost], budget: Budget) -> None:
    """Raise BudgetError unless a slot pair, or everything at once, fits."""
    whole, pair = sum(block.nbytes for block in blocks), _pair_bytes(blocks)
    least = min(whole, pair)
    if least <= budget.weights:
        return
    what = f"all {len(blocks)} blocks" if whole <= pair else "a ring of 2 slots"
    needed = least + budget.activations + budget.reserved
    parts = f"{what} {format_bytes(least)} + activations {format_bytes(budget.activations)}"
    if budget.reserved:
        parts += f" + reserved {format_bytes(budget.reserved)}"
    raise BudgetError(
        f"{budget.name} {format_bytes(budget.device)} is too small: {parts} = {format_bytes(needed)}; "
        f"the nearest plan that fits takes {needed} bytes",
        needed,
    )


def _pair_bytes(blocks: Sequence[BlockCost]) -> int:
    """Of the smallest ring of two slots."""
    return min((count * size for size, count in _rings(blocks, 2)), default=0)


def _require_staging(blocks: Sequence[BlockCost], rates: Rates, budget: Budget) -> None:
    if rates.link is None or not blocks:
        return
    if budget.staging > budget.host:
        raise BudgetError(
            f"host budget {format_bytes(budget.host)} is too small: the staging ring takes "
            f"{format_bytes(budget.staging)}; the nearest plan that fits takes {budget.staging} bytes",
            budget.staging,
            "host",
        )


def _rings(blocks: Sequence[BlockCost], slots: int) -> Iterator[tuple[int, int]]:
    """(slot bytes, slots) that hold every block, one per size of `_slot_sizes`."""
    sizes = _slot_sizes(blocks)
    for size in sizes:
        yield size, max(slots, -(-sizes[-1] // size))


def _slot_sizes(blocks: Sequence[BlockCost]) -> list[int]:
    """Sizes among the blocks, ascending, the smallest and the largest included; every so many of very many."""
    sizes = sorted({aligned(block.nbytes) for block in blocks})
    return [sizes[index] for index in _evenly(len(sizes) - 1, _MOST_SIZES)] if sizes else []


def _evenly(last: int, most: int) -> list[int]:
    """0 to `last`, both included: all of them, or `most` at even distances."""
    if last < most:
        return list(range(last + 1))
    return [index * last // (most - 1) for index in range(most)]


def _rings_within(blocks: Sequence[BlockCost], most: int, limit: int) -> list[tuple[int, int]]:
    """Rings of 2 to `most` slots that take at most `limit` bytes. Slots far smaller than the usual block, of which one
    takes many, only where there is room for no others."""
    found = [ring for count in range(2, most + 1) for ring in _rings(blocks, count) if ring[0] * ring[1] <= limit]
    found = list(dict.fromkeys(found))
    return [ring for ring in found if ring[0] * _SLOTS_OF_A_BLOCK >= _usual_bytes(blocks)] or found


def _usual_bytes(blocks: Sequence[BlockCost]) -> int:
    """The size of block that the median byte of a step lies in; 0 where there are none."""
    sizes = sorted(block.nbytes for block in blocks if block.visits > 0)
    passed, half = 0, sum(sizes) / 2
    for size in sizes:
        passed += size
        if passed >= half:
            return size
    return 0


def _resident_choices(blocks: Sequence[BlockCost], spare: int, most: int) -> Iterator[frozenset[str]]:
    """Up to `most` sets of blocks, and as many again, to keep on the device, none first, each within `spare` bytes and
    evenly spread.

    Every set is tried plain and with the blocks larger than most in it first: one large block can cost
    the ring more than it costs to keep.
    """
    useful = [block for block in blocks if block.is_worth_keeping]
    large = [block for block in useful if block.nbytes > _usual_bytes(useful)]
    seen: set[frozenset[str]] = set()
    for first in ([], large):
        fixed = sum(block.nbytes for block in first)
        rest = [block for block in useful if block not in first]
        for wanted in _evenly(len(rest), most):
            if fixed > spare:
                break
            chosen = frozenset(block.name for block in [*first, *_spread(rest, wanted, spare - fixed)])
            if chosen not in seen:
                seen.add(chosen)
                yield chosen
    if sum(block.nbytes for block in blocks) <= spare and (useful or _pair_bytes(blocks) > spare):
        yield frozenset(block.name for block in blocks)


def _spread(blocks: Sequence[BlockCost], wanted: int, limit: int) -> list[BlockCost]:
    """At most `wanted` of the blocks, at even distances, of at most `limit` bytes together."""
    chosen: list[BlockCost] = []
    left = limit
    for index, block in enumerate(blocks):
        is_turn = (index + 1) * wanted // len(blocks) > index * wanted // len(blocks)
        if is_turn and block.nbytes <= left:
            chosen.append(block)
            left -= block.nbytes
    return chosen


def _complete(
    blocks: Sequence[BlockCost], rates: Rates, budget: Budget, resident: frozenset[str], slots: int | None
) -> ResidencyPlan | None:
    """The best ring and host tiers for a set of resident blocks; None where no ring of two slots fits."""
    streamed = [block for block in blocks if block.name not in resident]
    held = sum(block.nbytes for block in blocks if block.name in resident)
    tiers = {block.name: Tier.DEVICE for block in blocks} | _host_tiers(streamed, rates, budget)
    # More slots than blocks that move hold nothing.
    wanted = min(slots or (3 if Tier.DISK in tiers.values() else 2), max(len(streamed), 2))
    # More slots than wanted can pay where some blocks take several of them.
    most = wanted if slots else 2 * wanted
    rings = _rings_within(streamed, most, budget.weights - held) if streamed else [(0, 0)]
    plans = [_describe(blocks, rates, budget, tiers, ring) for ring in rings if held <= budget.weights]
    usual = _usual_bytes(streamed)
    enough = [plan for plan in plans if not streamed or _room(plan, usual) >= wanted]
    if enough or not plans:
        # Of the same bytes the fewest slots: a block waits for no more neighbours to be free than it must.
        return min(enough, key=lambda plan: (_rank(plan, rates), plan.slots), default=None)
    best = min(plans, key=lambda plan: (-_room(plan, usual), _rank(plan, rates)))
    room = _room(best, usual)
    return replace(best, notes=(f"a ring for {room} instead of {wanted} blocks, for want of device memory",))


def _room(plan: ResidencyPlan, nbytes: int) -> int:
    """Blocks of so many bytes that the ring holds at once: a block may take several slots, and none in part."""
    return plan.slots // max(-(-nbytes // plan.slot_bytes), 1)


def _host_tiers(streamed: Sequence[BlockCost], rates: Rates, budget: Budget) -> dict[str, Tier]:
    """Pinned up to its cap, then cached up to the host budget, the rest on disk; each spread evenly."""
    tiers = {block.name: Tier.DISK for block in streamed}
    if rates.link is None:
        return tiers
    room = budget.host - budget.staging
    pinned = _most(streamed, min(room, budget.pinned - budget.staging))
    others = [block for block in streamed if block not in pinned]
    cached = _most(others, room - sum(block.nbytes for block in pinned))
    tiers |= {block.name: Tier.PINNED for block in pinned}
    tiers |= {block.name: Tier.CACHED for block in cached}
    return tiers


def _most(blocks: Sequence[BlockCost], limit: int) -> list[BlockCost]:
    """As many bytes of blocks as `_spread` fits into `limit`, of those worth keeping."""
    useful = [block for block in blocks if block.is_worth_keeping]
    choices = [_spread(useful, wanted, limit) for wanted in _evenly(len(useful), _MOST_COUNTS)]
    return max(choices, key=lambda choice: sum(block.nbytes for block in choice))


def _describe(
    blocks: Sequence[BlockCost], rates: Rates, budget: Budget, tiers: Mapping[str, Tier], ring: tuple[int, int]
) -> ResidencyPlan:
    slot_bytes, slots = ring
    held = {tier: sum(block.nbytes for block in blocks if tiers[block.name] is tier) for tier in Tier}
    staging = budget.staging if rates.link is not None and blocks else 0
    return ResidencyPlan(
        tiers=MappingProxyType(dict(tiers)),
        slots=slots,
        slot_bytes=slot_bytes,
        staging_bytes=staging,
        device_bytes=budget.activations + budget.reserved + held[Tier.DEVICE] + slots * slot_bytes,
        host_bytes=staging + held[Tier.PINNED] + held[Tier.CACHED],
        compute_seconds=sum(block.seconds * block.visits for block in blocks),
        stall_seconds=predict_stall(blocks, rates, tiers, slots=slots, slot_bytes=slot_bytes, staging_bytes=staging),
        streamed_bytes=sum(block.nbytes * block.visits for block in blocks if tiers[block.name] is not Tier.DEVICE),
    )


def predict_stall(
    blocks: Sequence[BlockCost],
    rates: Rates,
    tiers: Mapping[str, Tier],
    *,
    slots: int,
    slot_bytes: int,
    staging_bytes: int = 0,
) -> float:
    """Seconds per step in the steady state that the compute waits for weights.

    Plays the ring through: one lane moves blocks in the order of their visits as their slots become free,
    having read as much ahead as the staging ring holds; the other computes each block once it is there.
    """
    visits = [block for turn in range(_most_visits(blocks)) for block in blocks if block.visits > turn]
    moves = [_move(block, rates, tiers[block.name], slot_bytes, staging_bytes) for block in visits]
    computing = sum(block.seconds for block in visits)
    cycle = SlotCycle(slots)
    moved = computed = stall = 0.0
    free = [0.0] * slots
    for _ in range(_STEPS_TO_STEADY_STATE):
        before = computed
        for block, (count, whole, unread) in zip(visits, moves, strict=True):
            arrived, taken = 0.0, range(0)
            if count:
                taken = cycle.take(count)
                freed = max(free[taken.start : taken.stop])
                arrived = moved = max(moved + whole, freed + unread)
            computed = max(computed, arrived) + block.seconds
            for slot in taken:
                free[slot] = computed
        stall = computed - before - computing
    return max(stall, 0.0)


def _move(block: BlockCost, rates: Rates, tier: Tier, slot_bytes: int, staging_bytes: int) -> tuple[int, float, float]:
    """Slots that a block takes (0: it stays), seconds to bring it, and to bring what staging cannot hold ahead."""
    if tier is Tier.DEVICE:
        return 0, 0.0, 0.0
    across, source = block.nbytes / rates.across(), rates.source(tier)
    unread = max(block.nbytes - staging_bytes, 0) / source
    return -(-block.nbytes // slot_bytes), max(across, block.nbytes / source), max(across, unread)


def _most_visits(blocks: Sequence[BlockCost]) -> int:
    return max((block.visits for block in blocks), default=0)


class SlotCycle:
    """Hands out runs of neighbouring slots, round and round; the executor and the prediction share it."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._next = 0

    def take(self, count: int) -> range:
        """The next `count` neighbours; a run that would pass the end begins at slot 0 instead."""
        if count > self._slots:
            raise ValueError(f"a block needs {count} slots, the ring has {self._slots}")
        first = self._next if self._next + count <= self._slots else 0
        self._next = (first + count) % self._slots
        return range(first, first + count)

"""The planner: never over budget, deterministic, refuses with a number that works, spreads what it keeps."""

from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload import BudgetError, residency
from offload.residency import BlockCost, Budget, Rates, ResidencyPlan, SlotCycle, Tier, plan_residency, predict_stall

GIB = 1 << 30
LAYER = 181_000_192  # bytes of an INT8 block of the published model, aligned
RATES = Rates(disk=3e9, cached=8e9, link=12e9)


def layers(count: int, seconds: float = 0.05, nbytes: int = LAYER) -> list[BlockCost]:
    return [BlockCost(f"layers.{index}", nbytes, seconds) for index in range(count)]


def with_refiners(seconds: float = 0.05) -> list[BlockCost]:
    """34 blocks as published: two BF16 refiners of twice the size first, two outside the steps, 30 layers."""
    noise = [BlockCost(f"noise.{index}", 2 * LAYER, seconds) for index in range(2)]
    context = [BlockCost(f"context.{index}", 2 * LAYER, 0.001, visits=0) for index in range(2)]
    return noise + context + layers(30, seconds)


def bytes_of(blocks: list[BlockCost], plan: ResidencyPlan, tier: Tier) -> int:
    return sum(block.nbytes for block in blocks if plan.tiers[block.name] is tier)


costs = st.tuples(
    st.lists(
        st.tuples(
            st.sampled_from([256, 1024, 2048, 4096, 10_240]),
            st.floats(0, 1e-3),
            st.sampled_from([0, 1, 1, 1, 2]),
            st.sampled_from([True, True, False]),
        ),
        max_size=12,
    ),
    st.sampled_from([True, True, False]),  # whether any may stay
).map(
    lambda found: [
        BlockCost(f"b{i}", nbytes, seconds, visits, may_stay and found[1])
        for i, (nbytes, seconds, visits, may_stay) in enumerate(found[0])
    ]
)
budgets = st.builds(
    Budget,
    device=st.integers(0, 150_000),
    activations=st.integers(0, 20_000),
    reserved=st.integers(0, 3000),
    host=st.integers(0, 100_000),
    pinned=st.integers(0, 100_000),
    staging=st.sampled_from([0, 512, 4096]),
)
rates = st.sampled_from([Rates(3e6, 8e6, 12e6), Rates(1e6, 8e6, None), Rates(3e6, 1e9, 3e6)])


@settings(max_examples=150, deadline=None)
@given(costs, rates, budgets, st.sampled_from([None, 2, 3]))
def test_a_plan_keeps_within_every_budget_and_holds_every_block(
    blocks: list[BlockCost], rates: Rates, budget: Budget, slots: int | None
) -> None:
    try:
        plan = plan_residency(blocks, rates, budget, slots=slots)
    except BudgetError:
        return

    assert plan.tiers.keys() == {block.name for block in blocks}
    held = bytes_of(blocks, plan, Tier.DEVICE)
    assert plan.device_bytes == budget.activations + budget.reserved + held + plan.ring_bytes
    assert plan.device_bytes <= budget.device
    if rates.link is not None:
        pinned, cached = bytes_of(blocks, plan, Tier.PINNED), bytes_of(blocks, plan, Tier.CACHED)
        assert plan.host_bytes == plan.staging_bytes + pinned + cached
        assert plan.host_bytes <= budget.host
        assert not pinned or pinned + plan.staging_bytes <= budget.pinned
    else:
        assert plan.host_bytes == 0
    streamed = [block.nbytes for block in blocks if plan.tiers[block.name] is not Tier.DEVICE]
    assert all(nbytes <= plan.ring_bytes for nbytes in streamed)
    assert plan.slots >= 2 or not streamed
    assert plan.stall_seconds >= 0


@settings(max_examples=80, deadline=None)
@given(costs, rates, budgets)
def test_plans_are_deterministic(blocks: list[BlockCost], rates: Rates, budget: Budget) -> None:
    def attempt() -> ResidencyPlan | str:
        try:
            return plan_residency(blocks, rates, budget)
        except BudgetError as error:
            return str(error)

    assert attempt() == attempt()


@settings(max_examples=80, deadline=None)
@given(costs, rates, budgets)
def test_a_refusal_names_a_budget_that_works_and_is_the_smallest(
    blocks: list[BlockCost], rates: Rates, budget: Budget
) -> None:
    budget = Budget(budget.device, budget.activations, budget.reserved, GIB, budget.pinned, budget.staging)
    try:
        plan_residency(blocks, rates, budget)
    except BudgetError as error:
        needed = int(str(error).split(" takes ")[-1].split()[0])
    else:
        return

    enough = Budget(needed, budget.activations, budget.reserved, budget.host, budget.pinned, budget.staging)
    short = Budget(needed - 1, budget.activations, budget.reserved, budget.host, budget.pinned, budget.staging)
    assert plan_residency(blocks, rates, enough).device_bytes <= needed
    with pytest.raises(BudgetError):
        plan_residency(blocks, rates, short)


def test_a_budget_below_one_slot_pair_is_refused_with_the_numbers() -> None:
    budget = Budget(device=GIB, activations=GIB, host=GIB, staging=1 << 27)

    with pytest.raises(BudgetError) as caught:
        plan_residency(layers(34), RATES, budget)

    assert str(caught.value) == (
        "device budget 1.00 GiB is too small: a ring of 2 slots 345.23 MiB + activations 1.00 GiB = 1.34 GiB; "
        f"the nearest plan that fits takes {GIB + 2 * LAYER} bytes"
    )


def test_a_host_budget_below_the_staging_ring_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"host budget 64\.00 MiB is too small: the staging ring takes 128\.00 MiB"):
        plan_residency(layers(34), RATES, Budget(device=4 * GIB, host=1 << 26, staging=1 << 27))


def test_where_every_copy_hides_nothing_is_kept_on_the_device() -> None:
    plan = plan_residency(layers(34, seconds=1.0), RATES, Budget(device=4 * GIB, host=GIB, staging=1 << 27))

    assert plan.count(Tier.DEVICE) == 0
    assert plan.stall_seconds == pytest.approx(0)
    assert plan.slots == 3


def test_where_copies_cannot_hide_spare_memory_is_spent_and_spread_evenly() -> None:
    blocks = layers(32, seconds=0.01)
    budget = Budget(device=11 * LAYER, host=40 * LAYER, pinned=40 * LAYER, staging=LAYER)

    plan = plan_residency(blocks, RATES, budget, slots=2)

    kept = [index for index, block in enumerate(blocks) if plan.tiers[block.name] is Tier.DEVICE]
    assert plan.count(Tier.PINNED) == 32 - len(kept)
    assert len(kept) in (8, 9)
    gaps = {later - earlier for earlier, later in zip(kept, [*kept[1:], kept[0] + 32], strict=True)}
    assert max(gaps) - min(gaps) <= 1


def test_no_more_is_kept_than_hides_the_copies() -> None:
    """Copies take 15.1 ms against 14 ms of compute, and two slots catch up over one resident block in three."""
    blocks = layers(32, seconds=0.014)
    budget = Budget(device=40 * LAYER, host=40 * LAYER, pinned=40 * LAYER, staging=0)

    plan = plan_residency(blocks, RATES, budget, slots=2)
    free = plan_residency(blocks, RATES, budget)

    assert plan.count(Tier.DEVICE) == 11
    assert free.device_bytes < plan.device_bytes  # more slots need fewer resident blocks
    assert plan.stall_seconds < 0.001 * plan.compute_seconds


def test_blocks_of_twice_the_size_do_not_double_every_slot() -> None:
    tight = Budget(device=3 * LAYER, host=GIB, staging=1 << 27)

    plan = plan_residency(with_refiners(), RATES, tight)

    assert plan.slot_bytes == LAYER
    assert plan.ring_bytes <= 3 * LAYER


def test_blocks_outside_the_steps_are_never_kept() -> None:
    plan = plan_residency(with_refiners(0.01), RATES, Budget(10 * GIB, host=3 * GIB, pinned=GIB, staging=1 << 27))

    assert {plan.tiers[f"context.{index}"] for index in range(2)} <= {Tier.DISK, Tier.DEVICE}


@pytest.mark.parametrize("device", [GIB, 8 * GIB], ids=["some would fit", "all would fit"])
def test_a_phase_of_one_visit_each_keeps_nothing_and_has_a_ring_that_hides_its_reading(device: int) -> None:
    """Halves of layers, computed as fast as they are read: a ring that the larger fills would wait for each."""
    halves = [
        BlockCost(f"{index}.{half}", nbytes * LAYER // 3, 0.04 * nbytes, may_stay=False)
        for index in range(30)
        for half, nbytes in (("attention", 1), ("feed_forward", 2))
    ]

    plan = plan_residency(halves, Rates(disk=LAYER / 3 / 0.04), Budget(device=device))

    assert plan.count(Tier.DISK) == 60
    assert plan.stall_seconds < 0.1 * plan.compute_seconds
    assert plan.ring_bytes > 2 * (2 * LAYER // 3)


def test_ram_holds_a_fixed_spread_subset_pins_first() -> None:
    budget = Budget(device=3 * LAYER, host=17 * LAYER, pinned=9 * LAYER, staging=LAYER)

    plan = plan_residency(layers(32), RATES, budget)

    assert (plan.count(Tier.PINNED), plan.count(Tier.CACHED), plan.count(Tier.DISK)) == (8, 8, 16)


def test_without_a_link_spare_memory_keeps_as_many_blocks_as_fit() -> None:
    rates = Rates(disk=3e9, cached=8e9, link=None)

    plan = plan_residency(layers(34, seconds=5.0), rates, Budget(device=20 * LAYER))
    whole = plan_residency(layers(34, seconds=5.0), rates, Budget(device=34 * LAYER))

    assert (plan.count(Tier.DEVICE), plan.slots) == (17, 3)
    assert (whole.count(Tier.DEVICE), whole.slots) == (34, 0)
    assert whole.streamed_bytes == 0


@pytest.mark.parametrize("small", [512, 65_536, LAYER // 27])
@pytest.mark.parametrize("spare", [2.1, 2.5, 2.9])
def test_a_small_block_does_not_make_a_ring_of_small_slots_that_holds_one_layer(small: int, spare: float) -> None:
    blocks = [BlockCost("embedder", small, 0.0), *with_refiners(seconds=0.15)]
    rates, budget = Rates(disk=1.5e9), Budget(device=int(spare * LAYER))

    plan = plan_residency(blocks, rates, budget)

    assert (plan.slots, plan.slot_bytes) == (2, LAYER)
    assert plan.notes == ("a ring for 2 instead of 3 blocks, for want of device memory",)
    one_by_one = predict_stall(blocks, rates, plan.tiers, slots=53, slot_bytes=LAYER // 26)
    assert plan.stall_seconds < 0.5 * one_by_one


def test_many_small_slots_are_taken_where_there_is_room_for_no_others() -> None:
    blocks = [BlockCost("embedder", LAYER // 20, 0.0), BlockCost("refiner", LAYER + LAYER // 2, 0.1), *layers(4)]

    plan = plan_residency(blocks, Rates(disk=1.5e9), Budget(device=LAYER + LAYER // 2 + LAYER // 20))

    assert plan.slot_bytes < LAYER // 8
    assert plan.notes == ("a ring for 1 instead of 3 blocks, for want of device memory",)


def test_fewer_slots_than_wished_are_noted() -> None:
    plan = plan_residency(layers(34), RATES, Budget(device=2 * LAYER, host=GIB, staging=0), slots=3)

    assert plan.slots == 2
    assert plan.notes == ("a ring for 2 instead of 3 blocks, for want of device memory",)


def test_more_slots_than_blocks_change_nothing() -> None:
    rates, budget = Rates(disk=1.5e9), Budget(device=8 * LAYER)

    plan = plan_residency(layers(6), rates, budget, slots=10**9)

    assert plan == plan_residency(layers(6), rates, budget, slots=6)


@pytest.mark.parametrize("rates", [RATES, Rates(disk=3e9)], ids=["link", "no link"])
def test_a_thousand_blocks_of_different_sizes_are_planned_with_a_bounded_number_of_predictions(
    monkeypatch: pytest.MonkeyPatch, rates: Rates
) -> None:
    blocks = [BlockCost(f"b{index}", (1 + 7 * index % 1000) << 20, 0.01) for index in range(1000)]
    whole = sum(block.nbytes for block in blocks)
    visited = []

    def counted(blocks: list[BlockCost], *given: object, **named: object) -> float:
        visited.append(len(blocks))
        return predict_stall(blocks, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr("offload.residency.predict_stall", counted)
    budget = Budget(device=whole // 3, host=whole // 2, pinned=whole // 3, staging=1000 << 20)

    plan = plan_residency(blocks, rates, budget)

    assert sum(visited) < 2_500_000  # 0.8 million a second; with every set and size it would be billions
    assert 0.8 * budget.device < plan.device_bytes <= budget.device


def test_a_plan_is_frozen() -> None:
    plan = plan_residency(layers(3), RATES, Budget(device=4 * GIB, host=GIB))

    with pytest.raises(FrozenInstanceError):
        plan.slots = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        plan.tiers["layers.0"] = Tier.DISK  # type: ignore[index]


def test_the_predicted_stall_is_the_slower_lane_minus_the_compute() -> None:
    blocks = layers(34, seconds=0.01)
    tiers = {block.name: Tier.DISK for block in blocks}

    stall = predict_stall(blocks, RATES, tiers, slots=3, slot_bytes=LAYER)

    assert stall == pytest.approx(34 * (LAYER / 3e9 - 0.01), rel=1e-6)


def test_a_slot_cycle_keeps_runs_together() -> None:
    cycle = SlotCycle(3)

    assert [list(cycle.take(count)) for count in (1, 2, 2, 2, 1, 1, 3)] == [
        [0],
        [1, 2],
        [0, 1],
        [0, 1],
        [2],
        [0],
        [0, 1, 2],
    ]
    with pytest.raises(ValueError, match="needs 4 slots, the ring has 3"):
        cycle.take(4)


@settings(max_examples=150, deadline=None)
@given(costs, rates, budgets, st.sampled_from([None, 2, 3]))
def test_leaving_out_what_cannot_be_better_changes_no_plan(
    blocks: list[BlockCost], rates: Rates, budget: Budget, slots: int | None
) -> None:
    try:
        found = plan_residency(blocks, rates, budget, slots=slots)
    except BudgetError:
        return

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residency, "_least_rank", lambda *_: (-1.0, 0, 0))
        everything = residency._best_plan.__wrapped__(tuple(blocks), rates, budget, slots)
    assert found == everything


def test_few_choices_are_played_through_where_most_cannot_be_better(monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[int] = []

    def count(*args: object, **options: object) -> float:
        played.append(1)
        return predict_stall(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(residency, "predict_stall", count)
    plan = plan_residency(layers(60), Rates(disk=30e9), Budget(device=8 * GIB))

    assert plan.count(Tier.DEVICE) == 44
    assert len(played) < 60  # of a hundred sets and more, each with a few rings


def test_the_usual_block_is_the_one_that_the_median_byte_is_in() -> None:
    """Of halves of layers a ring holds three of the larger, so that it hides as much reading as with whole ones."""
    halves = [
        BlockCost(f"{index}.{half}", nbytes * LAYER // 3, 0.05)
        for index in range(30)
        for half, nbytes in (("attention", 1), ("feed_forward", 2))
    ]

    plan = plan_residency(halves, Rates(disk=30e9), Budget(device=GIB))

    assert plan.ring_bytes >= 3 * (2 * LAYER // 3)

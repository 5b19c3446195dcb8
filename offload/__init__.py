"""Weights from safetensors files within a byte budget; knows no model and no image.

A stack of equal layers, streamed from its file within `memory` ("2GiB"). Given are `path`, `layer` (one of
them, on the meta device), `layers` (how many there are), `hidden` (the input) and `steps` (rounds to make):

    with Checkpoint.open(path) as checkpoint:
        blocks = [Block.under(checkpoint, f"model.layers.{index}.") for index in range(layers)]
        probe = probe_io(checkpoint)
        costs = [BlockCost(block.name, block.nbytes, seconds=0.01) for block in blocks]
        rates = Rates(disk=probe.rates[probe.io])
        plan = plan_residency(costs, rates, Budget(device=parse_bytes(memory)))
        with Reader(checkpoint, io=probe.io) as reader, Ring(blocks, plan, CpuDevice(), reader) as ring:
            for _ in range(steps):
                for block in blocks:
                    with ring.visit(block.name) as weights:
                        hidden = torch.func.functional_call(layer, dict(weights), (hidden,))

On a CPU `PagedBlocks(checkpoint, blocks, plan)` lends the same without a reader and without copying, from the mapped
file; `probe_io(checkpoint, in_place=True)` says "mmap" where that spares processor time.
"""

from offload.block_source import BlockSource
from offload.blocks import Block, Extent, Part, SlotLayout, TensorSource
from offload.checkpoint import Checkpoint
from offload.cuda import CudaDevice
from offload.devices import CpuDevice, Device, OwnedDevice
from offload.driver import driver_bytes
from offload.errors import BudgetError, CheckpointError
from offload.header import TensorInfo
from offload.identity import FileIdentity
from offload.mapped import MappedBlocks
from offload.memory import (
    MemoryWatch,
    ProcessMemory,
    available_device_bytes,
    available_host_bytes,
    peak_device_bytes,
    process_memory,
    start_device_peak,
)
from offload.paged import PagedBlocks
from offload.pinned import PinnedArena, default_pin_limit
from offload.reading import IoProbe, Reader, probe_io
from offload.residency import BlockCost, Budget, Rates, ResidencyPlan, Tier, plan_residency, predict_stall
from offload.ring import Ring
from offload.sizes import format_bytes, module_bytes, parse_bytes, tensor_bytes

__all__ = [
    "Block",
    "BlockCost",
    "BlockSource",
    "Budget",
    "BudgetError",
    "Checkpoint",
    "CheckpointError",
    "CpuDevice",
    "CudaDevice",
    "Device",
    "Extent",
    "FileIdentity",
    "IoProbe",
    "MappedBlocks",
    "MemoryWatch",
    "OwnedDevice",
    "PagedBlocks",
    "Part",
    "PinnedArena",
    "ProcessMemory",
    "Rates",
    "Reader",
    "ResidencyPlan",
    "Ring",
    "SlotLayout",
    "TensorInfo",
    "TensorSource",
    "Tier",
    "available_device_bytes",
    "available_host_bytes",
    "default_pin_limit",
    "driver_bytes",
    "format_bytes",
    "module_bytes",
    "parse_bytes",
    "peak_device_bytes",
    "plan_residency",
    "predict_stall",
    "probe_io",
    "process_memory",
    "start_device_peak",
    "tensor_bytes",
]

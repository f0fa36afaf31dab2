"""Linears of quantized weights: torch's packed int4 kernels, and the dequantized fallback.

Legend: K inputs, N outputs, G groups, R rows of the batch, g inputs of one group.

The packed kernel computes `(q4 - 8) * scale + zero` with scale and zero in bf16, sums in fp32. Eight bits run through
the same kernel as two four-bit planes side by side, `q8 - 128 = 16 * (high - 8) + low`, with the input given twice:
at one row this beat both a loop of `_weight_int8pack_mm` over the groups and the dense bf16 product.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_eval.core import ConfigError

CPU_DTYPE = "QWEN_EVAL_CPU_DTYPE"
CPU_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GROUP_SIZES = (256, 128, 64, 32)  # of torch's int4 kernels
BLOCK_N = 64  # outputs packed together by the CPU kernel with AVX-512
CUDA_INNER_TILES = 8
TILE_N = 8  # outputs of one tile of tinygemm
MEASURED_ROWS = (8, 16, 32, 64, 128, 256)
SLAB_N = 1024  # outputs dequantized at a time: a few MiB
# From about this many rows on, dequantizing the layer for this call and multiplying densely is faster than the packed
# kernel, whose time grows with the rows (tools/bench_int4_decode.py prints the curve).
MAX_PACKED_ROWS = 96


@dataclass(frozen=True)
class Groups:
    """Groups of equal size over consecutive inputs, once the inputs are in the order `permutation` (None: as is)."""

    size: int
    permutation: Tensor | None


class DequantizedLinear(nn.Module):
    """Weights as plain numbers: right everywhere, and as large as an unquantized layer."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight_NK)
        self.register_buffer("bias", bias_N)
        self.kernel = f"dequantized {str(weight_NK.dtype).removeprefix('torch.')}"

    weight: Tensor
    bias: Tensor | None

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def weight_bytes(self) -> int:
        return self.weight.nbytes

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class PackedLinear(nn.Module):
    """bf16 input and output, weights in torch's int4 layout, one plane for 4 bits and two for 8 bits.

    Few rows go through the packed kernel; many rows dequantize this layer for the length of the call (on the CPU, whose
    layout is known) and use the dense product.
    """

    packed: Tensor
    scale_zero: Tensor  # bf16 [planes * G, N padded, 2]
    permutation: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        packed: Tensor,
        scale_zero: Tensor,
        *,
        shape: tuple[int, int],
        group_size: int,
        num_planes: int,
        has_zeros: bool,
        permutation: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.group_size, self.num_planes, self.has_zeros = group_size, num_planes, has_zeros
        self.register_buffer("packed", packed)
        self.register_buffer("scale_zero", scale_zero)
        self.register_buffer("permutation", permutation)
        self.register_buffer("bias", bias)
        where = "CPU" if packed.device.type == "cpu" else "CUDA tinygemm"
        self.kernel = f"torch int4pack ({where})" + (", two planes for 8 bits" if num_planes == 2 else "")
        self.max_packed_rows = MAX_PACKED_ROWS if can_unpack(packed.device.type) else None

    def use(self, max_packed_rows: int | None) -> None:
        """Dequantize for each call of more rows than this, from now on; None: never."""
        self.max_packed_rows = max_packed_rows
        if max_packed_rows is not None:
            self.kernel += f", dense beyond {max_packed_rows} rows"

    @property
    def weight_bytes(self) -> int:
        extra = 0 if self.permutation is None else self.permutation.nbytes
        return self.packed.nbytes + self.scale_zero.nbytes + extra

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.bfloat16, f"packed int4 takes bfloat16, got {x.dtype}"
        if x.numel() == 0:  # as the last layer of a prefix has it: CUDA launches no empty grid
            return x.new_empty(*x.shape[:-1], self.out_features)
        x_RK = x.reshape(-1, self.in_features)
        if self.permutation is not None:
            x_RK = x_RK[:, self.permutation]
        is_dense = self.max_packed_rows is not None and len(x_RK) > self.max_packed_rows
        y_RN = self._dense(x_RK) if is_dense else self._packed(x_RK)
        y_RN = y_RN[:, : self.out_features]
        if self.bias is not None:
            y_RN = y_RN + self.bias
        return y_RN.reshape(*x.shape[:-1], self.out_features)

    def _packed(self, x_RK: Tensor) -> Tensor:
        if self.num_planes == 2:
            x_RK = torch.cat([x_RK, x_RK], 1)
        return _int4_mm(x_RK.contiguous(), self.packed, self.group_size, self.scale_zero)

    def _dense(self, x_RK: Tensor) -> Tensor:
        """Slabs of outputs, each dequantized into memory that is still in the cache when it is multiplied."""
        if x_RK.device.type != "cpu":
            return x_RK @ self._scaled(unpack_tiles(self.packed, tile_order(self.packed)).to(x_RK.dtype), slice(None))
        dtype = dense_dtype()
        x, num_padded = x_RK.to(dtype), self.scale_zero.shape[1]
        y_RN = torch.empty(len(x), num_padded, dtype=x_RK.dtype)
        for start in range(0, num_padded, SLAB_N):
            outputs = slice(start, min(start + SLAB_N, num_padded))
            y_RN[:, outputs] = x @ self.unpacked(dtype, outputs)
        return y_RN

    def unpacked(self, dtype: torch.dtype, outputs: slice) -> Tensor:
        """The weight the packed kernel multiplies with, [K, outputs], inputs in permuted order; whole blocks only."""
        rows = self.packed.view(-1, self.in_features * self.num_planes, block_outputs() // 2)
        blocks = rows[outputs.start // block_outputs() : outputs.stop // block_outputs()]
        return self._scaled(unpack_cpu(blocks, dtype), outputs)

    def _scaled(self, planes: Tensor, outputs: slice) -> Tensor:
        """Codes [planes * K, outputs] as weights [K, outputs], in place where it can be."""
        scale_zero = self.scale_zero[:, outputs].to(planes.dtype)
        groups = len(scale_zero) // self.num_planes
        if self.num_planes == 2:
            high, low = planes.chunk(2)
            planes = high.sub_(8).mul_(16).add_(low)
        else:
            planes.sub_(8)
        weight_GgN = planes.view(groups, self.group_size, -1).mul_(scale_zero[-groups:, None, :, 0])
        if self.has_zeros:
            weight_GgN += scale_zero[:groups, None, :, 1]
        return weight_GgN.view(self.in_features, -1)


def has_packed(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch has a fast int4 kernel: bf16 on CPUs with AVX-512 or AVX2, bf16 on CUDA of capability 8 or more.

    On the CPU the fp32 and fp16 forms of the kernel are scalar loops, ten times slower than dense: never used.
    """
    if dtype != torch.bfloat16:
        return False
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("AVX512", "AVX2")


def contiguous_groups(group_K: Tensor, num_groups: int) -> Groups | None:
    """How to bring the inputs of each group together; None where no int4 kernel has groups of that size."""
    counts = torch.bincount(group_K, minlength=num_groups)
    size = int(counts[0])
    kernel_size = next((s for s in GROUP_SIZES if size % s == 0), None)
    if size == 0 or kernel_size is None or bool((counts != size).any()):
        return None
    if bool((group_K[1:] >= group_K[:-1]).all()):
        return Groups(kernel_size, None)
    return Groups(kernel_size, torch.argsort(group_K, stable=True))


def pack(
    q_NK: Tensor,
    zero_GN: Tensor,
    scale_GN: Tensor,
    groups: Groups,
    bits: int,
    bias: Tensor | None,
    *,
    device: torch.device,
) -> PackedLinear:
    """Repack codes (uint8) into torch's int4 layout. Larger groups than the kernel has are split, scales repeated."""
    out_features, in_features = q_NK.shape
    q_NK = q_NK.to(device)
    if groups.permutation is not None:
        q_NK = q_NK.index_select(1, groups.permutation.to(device))
    repeats = in_features // groups.size // len(scale_GN)
    scale_GN = scale_GN.float().repeat_interleave(repeats, 0)
    zero_GN = zero_GN.repeat_interleave(repeats, 0)
    half = 1 << (bits - 1)
    shift_GN = (half - zero_GN) * scale_GN
    if bits == 8:
        q_NK = torch.cat([q_NK >> 4, q_NK & 15], 1)
        # the scale is rounded first: with 16 s and 8 s exact multiples of it the two planes fit together exactly
        scale_GN = scale_GN.bfloat16().float()
        shift_GN = torch.cat([shift_GN, 8 * scale_GN])
        scale_GN = torch.cat([16 * scale_GN, scale_GN])
    scale_zero = torch.stack([scale_GN, shift_GN], -1).bfloat16()
    padding = -out_features % BLOCK_N
    packed = _int4_pack(F.pad(q_NK, (0, 0, 0, padding)))
    return PackedLinear(
        packed,
        F.pad(scale_zero, (0, 0, 0, padding)).contiguous().to(device),
        shape=(out_features, in_features),
        group_size=groups.size,
        num_planes=bits // 4,
        has_zeros=bool((zero_GN != half).any()),
        permutation=None if groups.permutation is None else groups.permutation.to(device),
        bias=None if bias is None else bias.to(device, torch.bfloat16),
    )


def _int4_pack(q_NK: Tensor) -> Tensor:
    if q_NK.device.type == "cpu":  # which wants int32: a slab of whole blocks at a time
        pack_slab = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        return torch.cat([pack_slab(slab_NK.int(), 1) for slab_NK in torch.split(q_NK, SLAB_N)])
    pairs = (q_NK[:, ::2] << 4 | q_NK[:, 1::2]).to(torch.uint8).contiguous()  # tinygemm: the even input is high
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack(pairs, _inner_tiles(q_NK.shape[1]))
    return packed


def _inner_tiles(in_features: int) -> int:
    """The largest tile count of tinygemm (8, 4 or 2 tiles of 16 inputs) that divides the inputs."""
    return next(tiles for tiles in (CUDA_INNER_TILES, 4, 2) if in_features % (tiles * 16) == 0)


def _int4_mm(x_RK: Tensor, packed: Tensor, group_size: int, scale_zero: Tensor) -> Tensor:
    name = "_weight_int4pack_mm_for_cpu" if x_RK.device.type == "cpu" else "_weight_int4pack_mm"
    y_RN: Tensor = getattr(torch.ops.aten, name)(x_RK, packed, group_size, scale_zero)
    return y_RN


def unpack_cpu(blocks_BKh: Tensor, dtype: torch.dtype) -> Tensor:
    """The codes 0..15 as [K, N] of `dtype`, from the CPU layout: per block of outputs and input the low nibbles are the
    first half of the block, the high nibbles the second half."""
    num_blocks, num_inputs, half = blocks_BKh.shape
    codes_KBN = torch.empty(num_inputs, num_blocks, 2 * half, dtype=dtype)
    codes_KBN[:, :, :half] = (blocks_BKh & 15).transpose(0, 1)
    codes_KBN[:, :, half:] = (blocks_BKh >> 4).transpose(0, 1)
    return codes_KBN.view(num_inputs, -1)


def unpack_tiles(packed: Tensor, order: Tensor) -> Tensor:
    """The codes 0..15 as [K, N] uint8, from tinygemm's layout [N/8, K/(16 tiles), 32, tiles/2] of int32 words."""
    blocks, strips = packed.shape[:2]
    pairs = packed.reshape(blocks, strips, -1).view(torch.uint8)  # lowest byte first; a byte a code, never a word
    nibbles = torch.stack([pairs & 15, pairs >> 4], -1).flatten(2)
    tiles = nibbles[:, :, order].view(blocks, strips, TILE_N, -1)
    return tiles.permute(1, 3, 0, 2).reshape(-1, blocks * TILE_N)


def tile_order(packed: Tensor) -> Tensor:
    """Where in a tile of `packed` each code lies, [8 * inputs of a tile] in the order of outputs, then inputs."""
    return _learnt_order(packed.device, 2 * packed.shape[3])


@functools.cache
def _learnt_order(device: torch.device, inner_tiles: int) -> Tensor:
    def pack_tile(q_NK: Tensor) -> Tensor:
        return _int4_pack(q_NK.to(device))

    return learn_order(pack_tile, 16 * inner_tiles).to(device)


def learn_order(pack_tile: Callable[[Tensor], Tensor], tile_inputs: int) -> Tensor:
    """The order of nibbles in one packed tile, read off tiles that hold their own positions, four bits at a time.

    The layout is the library's secret: it is found out, not assumed.
    """
    positions = torch.arange(TILE_N * tile_inputs).view(TILE_N, tile_inputs)
    shifts = torch.arange(0, 32, 4)
    found = torch.zeros(positions.numel(), dtype=torch.long)
    for bits in range(0, positions.numel().bit_length(), 4):
        words = pack_tile(((positions >> bits) & 15).int()).cpu().reshape(-1, 1)
        found |= ((words >> shifts) & 15).long().flatten() << bits
    return torch.argsort(found)


def choose_rows(modules: Iterable[nn.Module]) -> None:
    """On a GPU: from how many rows on dequantizing a layer and multiplying densely is faster, measured by shape."""
    by_shape: dict[tuple[int, ...], list[PackedLinear]] = {}
    for module in modules:
        if isinstance(module, PackedLinear) and module.packed.device.type == "cuda":
            key = (module.out_features, module.in_features, module.num_planes, module.packed.device.index or 0)
            by_shape.setdefault(key, []).append(module)
    for linears in by_shape.values():
        limit = crossover(functools.partial(_cuda_seconds, linears[0]))
        for linear in linears:
            linear.use(limit)


def crossover(seconds: Callable[[bool, int], float]) -> int | None:
    """The largest of `MEASURED_ROWS` up to which the packed kernel wins; `seconds(is_dense, rows)` measures."""
    wins = [rows for rows in MEASURED_ROWS if seconds(False, rows) <= seconds(True, rows)]
    if len(wins) == len(MEASURED_ROWS):
        return None
    return max(wins, default=MEASURED_ROWS[0])


@torch.inference_mode()
def _cuda_seconds(linear: PackedLinear, is_dense: bool, rows: int) -> float:
    x_RK = torch.ones(rows, linear.in_features, dtype=torch.bfloat16, device=linear.packed.device)
    product = linear._dense if is_dense else linear._packed
    with torch.cuda.device(x_RK.device):  # events are of the current one
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        product(x_RK)  # the first call sets the kernel up
        start.record()
        for _ in range(3):
            product(x_RK)
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end)) / 3e3


def block_outputs() -> int:
    return BLOCK_N if torch.backends.cpu.get_cpu_capability() == "AVX512" else BLOCK_N // 2


@functools.cache
def can_unpack(device_type: str) -> bool:
    """Whether this torch packs the way `unpack_cpu` believes: tried once on a small matrix, since it is no promise."""
    if device_type != "cpu":
        return False
    q_NK = torch.randint(0, 16, (2 * BLOCK_N, 96), generator=torch.Generator().manual_seed(0))
    blocks = _int4_pack(q_NK).view(-1, 96, block_outputs() // 2)
    return torch.equal(unpack_cpu(blocks, torch.float32), q_NK.t().float())


def dense_dtype() -> torch.dtype:
    """bf16 where the CPU multiplies it natively (AMX or AVX512-BF16), else fp32, which is then 3 times faster.

    QWEN_EVAL_CPU_DTYPE=bf16|fp32 overrides it, to reproduce the numbers of another machine and to test its path.
    """
    wanted = os.environ.get(CPU_DTYPE)
    if wanted is not None and wanted not in CPU_DTYPES:
        raise ConfigError(f"{CPU_DTYPE}={wanted}: one of {', '.join(CPU_DTYPES)}")
    return _native_dtype() if wanted is None else CPU_DTYPES[wanted]


@functools.cache
def _native_dtype() -> torch.dtype:
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    is_native = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return torch.bfloat16 if is_native else torch.float32


@dataclass(frozen=True, kw_only=True)
class WeightReport:
    """The quantized Linears of a model: layers per kernel, their bytes and what bf16 would take."""

    kernels: dict[str, int]
    weight_bytes: int
    bf16_bytes: int

    @property
    def fallback(self) -> str | None:
        """One line to report that layers were dequantized, with the memory it costs; None if all are packed."""
        plain = {kernel: count for kernel, count in self.kernels.items() if kernel.startswith("dequantized")}
        if not plain:
            return None
        names = ", ".join(f"{count} layers {kernel}" for kernel, count in plain.items())
        share = self.weight_bytes / max(1, self.bf16_bytes)
        return (
            f"no packed kernel here for these quantized weights: {names}; the quantized layers take "
            f"{self.weight_bytes / 2**20:.0f} MiB, {share:.2f} of bf16 (model.dtype=bf16 packs where torch can)"
        )


@runtime_checkable
class QuantizedLinear(Protocol):
    """What every quantized Linear tells about itself."""

    kernel: str
    in_features: int
    out_features: int
    weight_bytes: int


def report(modules: Iterable[nn.Module]) -> WeightReport:
    """Sum up the quantized Linears among the modules (pass `model.modules()`)."""
    linears = [module for module in modules if isinstance(module, QuantizedLinear)]
    return WeightReport(
        kernels=dict(Counter(linear.kernel for linear in linears)),
        weight_bytes=sum(linear.weight_bytes for linear in linears),
        bf16_bytes=sum(2 * linear.in_features * linear.out_features for linear in linears),
    )

"""x [M, K] @ weight.T for many rows of x on sm_90, from the weights of `_fragment_kernel`, by wgmma (Gluon).

The weight is the left operand: each thread decodes, in registers, the very part that the instruction takes from it.
x, put in order by `permute_kernel`, goes through shared memory, several tiles ahead, and is read there by the
instruction itself. While one instruction runs the next 32 columns are decoded. A weight costs 3.4 to 3.9 instructions
of any kind.

Imported on request only: it needs Triton 3.6 or later, with the NVIDIA backend.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy

_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier     # renamed in Triton 3.7


@triton.jit(do_not_specialize=["M", "K", "X_STRIDE"])
def permute_kernel(x, ordered, M, K, X_STRIDE, K_PAD, BLOCK_M: tl.constexpr):
    """Reorder x [M, K] with each 32 columns in the instruction's order, zero past the ends: ordered [M_PAD, K_PAD].

    Position 16 a + 8 b + 2 q + h of the 32 holds column 8 q + 4 a + 2 b + h.
    """
    position = tl.arange(0, 128)
    column = ((position & 96) + 8 * ((position >> 1) & 3) + 4 * ((position >> 4) & 1) + 2 * ((position >> 3) & 1)
              + (position & 1))
    k = tl.program_id(0) * 128
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    value = tl.load(x + m * X_STRIDE + (k + column)[None, :], mask=(m < M) & (k + column < K)[None, :], other=0.0)
    tl.store(ordered + m * K_PAD + (k + position)[None, :], value)


@gluon.jit
def _load_four(pointers):
    return gl.inline_asm_elementwise(
        "ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l",
        [pointers.to(gl.int64)], dtype=(gl.uint32, gl.uint32, gl.uint32, gl.uint32), is_pure=True, pack=1)


@gluon.jit
def _load_two(pointers):
    return gl.inline_asm_elementwise(
        "ld.global.nc.L1::no_allocate.L2::128B.v2.b32 {$0, $1}, [$2];", "=r,=r,l", [pointers.to(gl.int64)],
        dtype=(gl.uint32, gl.uint32), is_pure=True, pack=1)


@gluon.jit
def _load_one(pointers):
    return gl.inline_asm_elementwise(
        "ld.global.nc.L1::no_allocate.L2::64B.b32 $0, [$1];", "=r,l", [pointers.to(gl.int64)],
        dtype=gl.uint32, is_pure=True, pack=1)


@gluon.jit
def _load_tiles(packed, scales, tiles, lane, BITS: gl.constexpr, SCALED: gl.constexpr, HALVES: gl.constexpr):
    """Return words of tiles [1, T], a tuple of BITS uint32 [32, T]; and one of scale codes if SCALED."""
    loaded = ()
    if BITS == 8:
        loaded = _load_four(packed + (tiles * 256 + lane * 4)) + _load_four(packed + (tiles * 256 + 128 + lane * 4))
    else:
        if BITS & 4:
            loaded = loaded + _load_four(packed + (tiles * (BITS * 32) + lane * 4))
        if BITS & 2:
            loaded = loaded + _load_two(packed + (tiles * (BITS * 32) + (BITS & 4) * 32 + lane * 2))
        if BITS & 1:
            loaded = loaded + (_load_one(packed + (tiles * (BITS * 32) + (BITS & 6) * 32 + lane)),)
    if SCALED:
        row = lane // 4 * HALVES + lane % 4 * HALVES // 4
        loaded = loaded + (_load_one(scales + (tiles * (8 * HALVES) + row)),)
    return loaded


@gluon.jit
def _moved(words, MOVES: gl.constexpr, MOVE: gl.constexpr):
    WORD: gl.constexpr = MOVES[MOVE][0]
    SHIFT: gl.constexpr = MOVES[MOVE][1]
    MASK: gl.constexpr = MOVES[MOVE][2] * 0x10001
    if SHIFT >= 0:
        return (words[WORD] << SHIFT) & MASK
    else:
        return (words[WORD] >> (-SHIFT)) & MASK


@gluon.jit
def _fma_lanes(a, b, c, BF16: gl.constexpr):
    if BF16:
        return gl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=gl.uint32, is_pure=True, pack=1)
    else:
        return gl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=gl.uint32, is_pure=True, pack=1)


@gluon.jit
def _half(lanes, HALF: gl.constexpr, BF16: gl.constexpr):
    bits = (lanes >> (16 * HALF)).to(gl.uint16)
    if BF16:
        return bits.to(gl.bfloat16, bitcast=True)
    else:
        return bits.to(gl.float16, bitcast=True)


@gluon.jit
def _pair(words, factor, PAIR: gl.constexpr, MOVES: gl.constexpr, FIRST: gl.constexpr, INT: gl.constexpr,
          SCALED: gl.constexpr, BF16: gl.constexpr):
    START: gl.constexpr = FIRST[PAIR]
    END: gl.constexpr = FIRST[PAIR + 1]
    lanes = _moved(words, MOVES, START)
    for move in gl.static_range(START + 1, END):
        lanes |= _moved(words, MOVES, move)
    if INT != 0:
        ONE: gl.constexpr = 0x43004300 if BF16 else 0x64006400
        low = (lanes & ((INT - 1) * 0x10001)) | ONE
        high = (lanes & (INT * 0x10001)) | (ONE | 0x80008000)
        lanes = _fma_lanes(low, low * 0 + (0x3F803F80 if BF16 else 0x3C003C00), high, BF16)
        if SCALED:
            lanes = _fma_lanes(lanes, factor, lanes * 0 + 0x80008000, BF16)
    else:
        lanes = _fma_lanes(lanes, factor, lanes * 0 + 0x80008000, BF16)
    return lanes


@gluon.constexpr_function
def decoded_layout(block_n, warps):
    registers, rows = [[0, 1], [0, 16], [0, 8], [8, 0]], 16 * warps
    while rows < block_n:
        registers.append([rows, 0])
        rows *= 2
    warp_bits = warps.bit_length() - 1
    return gl.DistributedLinearLayout(
        registers, [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [[16 << i, 0] for i in range(warp_bits)], [],
        [block_n, 32])


@gluon.jit(do_not_specialize=["M", "K_TILES", "N_TILES", "ROW_SCALES", "M_BLOCKS"])
def wide_kernel(
    x, packed, scales, row_scale, out, M, N, K_TILES, N_TILES, ROW_SCALES, M_BLOCKS,
    BITS: gl.constexpr, MOVES: gl.constexpr, FIRST: gl.constexpr, INT: gl.constexpr, FACTOR: gl.constexpr,
    SCALES: gl.constexpr, SCALE_MUL: gl.constexpr, SCALE_ADD: gl.constexpr, HALVES: gl.constexpr, BLOCK: gl.constexpr,
    BF16: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
    SPLIT: gl.constexpr, CHUNK: gl.constexpr,
):
    """Compute out [M, N]; a program makes BLOCK_M x BLOCK_N of it. x [M_PAD, K_TILES * 128] as `permute_kernel` left
    it.

    SPLIT programs divide K among them; if there are several, each writes its fp32 sums to out [SPLIT, M, N], which
    `reduce_kernel` adds up. CHUNK times 32 columns are decoded, then multiplied, at once.
    """
    SCALED: gl.constexpr = SCALES == "codes"
    DTYPE: gl.constexpr = gl.bfloat16 if BF16 else gl.float16
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    DECODED: gl.constexpr = decoded_layout(BLOCK_N, WARPS)      # LEFT, with each thread's own in another order
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    T: gl.constexpr = BLOCK_N // 8

    block = gl.program_id(0) // SPLIT
    part = gl.program_id(0) % SPLIT
    k_begin = part * K_TILES // SPLIT
    k_end = (part + 1) * K_TILES // SPLIT
    pid_m = block % M_BLOCKS
    pid_n = block // M_BLOCKS
    x_m = pid_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, COPY))
    x_k = gl.arange(0, 128, gl.SliceLayout(0, COPY))
    x_pointers = x + x_m[:, None] * (K_TILES * 128) + x_k[None, :]
    tiles_of_x = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, 128], SHARED)
    # A tile's place is written again only when every warp has passed the next but one.
    AHEAD: gl.constexpr = STAGES - 2
    for stage in gl.static_range(AHEAD):
        following = gl.minimum(k_begin + stage, k_end - 1)
        async_copy.async_copy_global_to_shared(tiles_of_x.index(stage), x_pointers + following * 128)
        async_copy.commit_group()

    lane = gl.arange(0, 32)[:, None]
    first_tile = gl.minimum(pid_n * T + gl.arange(0, T), N_TILES - 1)[None, :] * K_TILES
    sums = gl.full([BLOCK_N, BLOCK_M], 0.0, gl.float32, ACC)
    before = ()
    for _ in gl.static_range(CHUNK):
        before = before + (gl.full([BLOCK_N, 32], 0.0, DTYPE, LEFT),)
    ahead = _load_tiles(packed, scales, first_tile + k_begin, lane, BITS, SCALED, HALVES)
    for k_tile in range(k_begin, k_end):
        step = k_tile - k_begin
        words = ahead
        ahead = _load_tiles(packed, scales, first_tile + gl.minimum(k_tile + 1, k_end - 1), lane, BITS, SCALED, HALVES)
        async_copy.wait_group(AHEAD - 1)
        hopper.fence_async_shared()
        _barrier()
        following = gl.minimum(k_tile + AHEAD, k_end - 1)
        async_copy.async_copy_global_to_shared(tiles_of_x.index((step + AHEAD) % STAGES), x_pointers + following * 128)
        async_copy.commit_group()
        tile_of_x = tiles_of_x.index(step % STAGES).permute((1, 0))
        factor = words[0] * 0 + FACTOR
        for first in gl.static_range(0, 4, CHUNK):
            weights = ()
            for j in gl.static_range(first, first + CHUNK):
                if SCALED:
                    factor = ((words[BITS] >> (8 * j)) & 0xFF) * SCALE_MUL + SCALE_ADD
                p0 = _pair(words, factor, 4 * j, MOVES, FIRST, INT, SCALED, BF16)
                p1 = _pair(words, factor, 4 * j + 1, MOVES, FIRST, INT, SCALED, BF16)
                p2 = _pair(words, factor, 4 * j + 2, MOVES, FIRST, INT, SCALED, BF16)
                p3 = _pair(words, factor, 4 * j + 3, MOVES, FIRST, INT, SCALED, BF16)
                lanes = gl.join(gl.join(p0, p1), gl.join(p2, p3)).reshape([8, 4, T, 2, 2])
                weight = gl.join(_half(lanes, 0, BF16), _half(lanes, 1, BF16)).permute(2, 0, 4, 3, 1, 5)
                weight = gl.convert_layout(gl.set_auto_layout(weight.reshape([BLOCK_N, 32]), DECODED), LEFT)
                weights = weights + (weight,)
            for j in gl.static_range(CHUNK):
                sums = hopper.warpgroup_mma(weights[j], tile_of_x.slice(32 * (first + j), 32, 0), sums, is_async=True)
            # Instructions read their registers while they run, and the next tile is decoded into the same ones: at
            # most half a tile may be left running. With CHUNK = 4 and four of them left running, results were NaN
            # (H200, Triton 3.6).
            done = hopper.warpgroup_mma_wait(num_outstanding=CHUNK if CHUNK < 4 else 0, deps=(sums,) + before)
            sums = done[0]
            before = weights
    done = hopper.warpgroup_mma_wait(num_outstanding=0, deps=(sums,) + before)
    sums = done[0]
    async_copy.wait_group(0)

    STORE: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, WARPS], [0, 1])
    if SPLIT == 1:
        n = pid_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, ACC))
        scale = gl.load(row_scale + gl.minimum(n, N - 1) * ROW_SCALES)
        total = gl.convert_layout((sums * scale[:, None]).to(DTYPE), STORE)
    else:
        total = gl.convert_layout(sums, STORE)
        out += part.to(gl.int64) * M * N
    n = pid_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, STORE))
    m = pid_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, STORE))
    gl.store(out + (m.to(gl.int64)[None, :] * N + n[:, None]), total, mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit(do_not_specialize=["M", "ROW_SCALES"])
def reduce_kernel(parts, row_scale, out, M, N, ROW_SCALES, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """Compute out [M, N] = the sum of parts [SPLIT, M, N], in order, times row_scale."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.program_id(1).to(tl.int64)
    total = tl.load(parts + m * N + n, mask=n < N, other=0.0)
    for part in tl.static_range(1, SPLIT):
        total += tl.load(parts + (part * M + m) * N + n, mask=n < N, other=0.0)
    total = total * tl.load(row_scale + tl.minimum(n, N - 1) * ROW_SCALES)
    tl.store(out + m * N + n, total.to(out.dtype.element_ty), mask=n < N)

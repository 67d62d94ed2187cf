
"""x [M, K] @ weight.T for many rows of x on sm_90, from the weights of `_fragment_kernel`, by wgmma (Gluon).

One warp copies tiles of x and of the packed weight into shared memory, several ahead, by bulk tensor copies. The other
warps take codes from there into registers, decode them to what the matrix instruction takes as its left operand, and
multiply while the next 32 columns are decoded; x, put in order by `order_kernel`, is read by the instruction itself.
There is one program to a multiprocessor. Each makes whole tiles of the result as long as there is one for every
program; the K of the remaining tiles is divided evenly among all of them, and `reduce_kernel` adds up their sums, in
order.

Imported on request only: it needs Triton 3.6 or later, with the NVIDIA backend.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fpxbench.impls._triton_modules import kernels

_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier     # renamed in Triton 3.7
_bulk_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared     # and this
# A program decodes as `_fragment_kernel`'s do. Gluon's own library takes over Triton's functions in this way.
_fragment = kernels("_fragment_kernel", False)
_pair, _half = gluon.jit(_fragment._pair.fn), gluon.jit(_fragment._half.fn)


@triton.jit(do_not_specialize=["M", "K", "X_STRIDE", "K_PAD"])
def order_kernel(x, ordered, M, K, X_STRIDE, K_PAD, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Reorder x [M, K], each 16 columns as the instruction takes them, zero past the end: ordered [M, K_PAD].

    A column is a pair of numbers, int32; K, X_STRIDE and K_PAD are multiples of 4, and addresses of 16 bytes. Position
    4 c + q of the 16 holds column 4 q + c.
    """
    gdc_launch_dependents()
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    inside = tl.max_constancy((m < M) & (k < K), [1, 4])
    value = tl.load(x + m * tl.multiple_of(X_STRIDE, 4) + k, mask=inside, other=0)
    value = tl.reshape(tl.permute(tl.reshape(value, [BLOCK_M, BLOCK_K // 16, 4, 4]), [0, 1, 3, 2]), [BLOCK_M, BLOCK_K])
    inside = tl.max_constancy((m < M) & (k < K_PAD), [1, 4])
    tl.store(ordered + m * tl.multiple_of(K_PAD, 4) + k, value, mask=inside)


@gluon.constexpr_function
def _rows(block_n, warps, width):
    """Return where a warp's tiles of 8 rows lie: bases of registers, then of warps, in `width` dimensions."""
    rest = [0] * (width - 1)
    tiles, registers = 2 * warps, [[1, *rest]]
    while tiles < block_n // 8:
        registers.append([tiles, *rest])
        tiles *= 2
    return registers, [[2 << i, *rest] for i in range(warps.bit_length() - 1)]


@gluon.constexpr_function
def _words_layout(block_n, warps, count):
    """Return the layout of [BLOCK_N / 8, 32 count] with `count` neighbouring words to a lane."""
    registers, of_warps = _rows(block_n, warps, 2)
    own = [[0, 1 << i] for i in range(count.bit_length() - 1)]
    return gl.DistributedLinearLayout(own + registers, [[0, count << i] for i in range(5)], of_warps, [],
                                      [block_n // 8, 32 * count])


@gluon.constexpr_function
def _scales_layout(block_n, warps, halves):
    """Return the layout of [BLOCK_N / 8, 8 halves, 4 / halves]: the word of each lane's row and half."""
    registers, of_warps = _rows(block_n, warps, 3)
    shared = [[0, 0, 1 << i] for i in range((4 // halves).bit_length() - 1)]
    lanes = shared + [[0, 1 << i, 0] for i in range(5 - len(shared))]
    return gl.DistributedLinearLayout(registers, lanes, of_warps, [], [block_n // 8, 8 * halves, 4 // halves])


@gluon.jit
def _halves(value):
    """Return a tensor's two halves along its last dimension."""
    ROWS: gl.constexpr = value.shape[0]
    COLUMNS: gl.constexpr = value.shape[1]
    return value.reshape([ROWS, 2, COLUMNS // 2]).permute(0, 2, 1).split()


@gluon.jit
def _plane(place, BLOCK_N: gl.constexpr, WARPS: gl.constexpr, COUNT: gl.constexpr):
    """Load COUNT uint32 [BLOCK_N / 8, 32], word by word, from shared memory [BLOCK_N / 8, 32 COUNT]."""
    T: gl.constexpr = BLOCK_N // 8
    ONE: gl.constexpr = _words_layout(BLOCK_N, WARPS, 1)
    words = place.load(_words_layout(BLOCK_N, WARPS, COUNT)).to(gl.uint32, bitcast=True)
    if COUNT == 1:
        return (words,)
    elif COUNT == 2:
        w0, w1 = words.reshape([T, 32, 2]).split()
        return gl.convert_layout(w0, ONE, assert_trivial=True), gl.convert_layout(w1, ONE, assert_trivial=True)
    else:
        even, odd = words.reshape([T, 32, 2, 2]).split()
        w0, w2 = even.split()
        w1, w3 = odd.split()
        return (gl.convert_layout(w0, ONE, assert_trivial=True), gl.convert_layout(w1, ONE, assert_trivial=True),
                gl.convert_layout(w2, ONE, assert_trivial=True), gl.convert_layout(w3, ONE, assert_trivial=True))


@gluon.jit
def _place(item, PROGRAMS, FULL, REST, K_TILES, M_BLOCKS, N_BLOCKS, GROUP: gl.constexpr):
    """Return a program's tile number `item`: its blocks along m and n, its part of K, and where a part's sums go (-1:
    none)."""
    pid = gl.program_id(0)
    whole = FULL // PROGRAMS
    begin = pid * (REST * K_TILES) // PROGRAMS
    end = (pid + 1) * (REST * K_TILES) // PROGRAMS
    number = begin // K_TILES + item - whole
    tile = pid + item * PROGRAMS
    k_begin = 0
    k_end = K_TILES
    slot = -1
    if item >= whole:
        tile = FULL + number
        k_begin = gl.maximum(begin - number * K_TILES, 0)
        k_end = gl.minimum(end - number * K_TILES, K_TILES)
        slot = pid + number
    if tile >= M_BLOCKS * N_BLOCKS:
        k_end = k_begin
    # GROUP blocks of x stay in the cache while the weight goes by.
    first_m = tile // (GROUP * N_BLOCKS) * GROUP
    height = gl.maximum(gl.minimum(M_BLOCKS - first_m, GROUP), 1)
    inner = tile - first_m * N_BLOCKS
    return first_m + inner % height, inner // height, k_begin, k_end, slot


@gluon.jit
def _copy(x_desc, four_desc, two_desc, one_desc, scales_desc, x_tiles, fours, eights, twos, ones, scale_tiles, ready,
          free, PROGRAMS, FULL, REST, K_TILES, M_BLOCKS, N_BLOCKS, BITS: gl.constexpr, SCALED: gl.constexpr,
          HALVES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
          GROUP: gl.constexpr):
    T: gl.constexpr = BLOCK_N // 8
    BYTES: gl.constexpr = BLOCK_M * 256 + T * 128 * BITS + (T * 32 * HALVES if SCALED else 0)
    gdc_wait()      # for `order_kernel`, which was launched just before
    count = 0
    for item in range(FULL // PROGRAMS + 2):
        block_m, block_n, k_begin, k_end, slot = _place(item, PROGRAMS, FULL, REST, K_TILES, M_BLOCKS, N_BLOCKS, GROUP)
        for k in range(k_begin, k_end):
            stage = count % STAGES
            mbarrier.wait(free.index(stage), ((count // STAGES) & 1) ^ 1)
            full = ready.index(stage)
            mbarrier.expect(full, BYTES)
            n = block_n * T
            word = k * (32 * BITS)
            if BITS & 12:
                _bulk_copy(four_desc, [n, word], full, fours.index(stage))
            if BITS & 8:
                _bulk_copy(four_desc, [n, word + 128], full, eights.index(stage))
            if BITS & 2:
                _bulk_copy(two_desc, [n, word + (BITS & 4) * 32], full, twos.index(stage))
            if BITS & 1:
                _bulk_copy(one_desc, [n, word + (BITS & 6) * 32], full, ones.index(stage))
            if SCALED:
                _bulk_copy(scales_desc, [n, k * (8 * HALVES)], full, scale_tiles.index(stage))
            _bulk_copy(x_desc, [block_m * BLOCK_M, k * 128], full, x_tiles.index(stage))
            count += 1


@gluon.jit
def _store(sums, row_scale, out, first_m, first_n, M, N, ROW_SCALES, DTYPE: gl.constexpr, ACC: gl.constexpr,
           BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, WARPS: gl.constexpr):
    """Scale and round the sums [BLOCK_N, BLOCK_M] and store them, 32 rows of x at a time."""
    STORE: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, WARPS], [0, 1])
    LEVELS: gl.constexpr = (BLOCK_M // 32).bit_length() - 1 if BLOCK_M > 32 else 0
    ROWS: gl.constexpr = BLOCK_M >> LEVELS
    n = first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, ACC))
    scale = gl.load(row_scale + gl.minimum(n, N - 1) * ROW_SCALES)
    pieces = ((sums * scale[:, None]).to(DTYPE),)
    for level in gl.static_range(LEVELS):
        halved = ()
        for piece in gl.static_range(1 << level):
            low, high = _halves(pieces[piece])
            halved = halved + (low, high)
        pieces = halved
    n = first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, STORE))
    for piece in gl.static_range(1 << LEVELS):
        m = first_m + piece * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, STORE))
        gl.store(out + (m.to(gl.int64)[None, :] * N + n[:, None]), gl.convert_layout(pieces[piece], STORE),
                 mask=(n < N)[:, None] & (m < M)[None, :])


@gluon.jit
def _multiply(x_tiles, fours, eights, twos, ones, scale_tiles, ready, free, row_scale, out, parts, M, N, ROW_SCALES,
              PROGRAMS, FULL, REST, K_TILES, M_BLOCKS, N_BLOCKS, BITS: gl.constexpr, MOVES: gl.constexpr,
              FIRST: gl.constexpr, INT: gl.constexpr, FACTOR: gl.constexpr, SCALED: gl.constexpr,
              SCALE_MUL: gl.constexpr, SCALE_ADD: gl.constexpr, HALVES: gl.constexpr, BF16: gl.constexpr,
              BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
              CHUNK: gl.constexpr, GROUP: gl.constexpr):
    T: gl.constexpr = BLOCK_N // 8
    DTYPE: gl.constexpr = gl.bfloat16 if BF16 else gl.float16
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    count = 0
    for item in range(FULL // PROGRAMS + 2):
        block_m, block_n, k_begin, k_end, slot = _place(item, PROGRAMS, FULL, REST, K_TILES, M_BLOCKS, N_BLOCKS, GROUP)
        sums = gl.full([BLOCK_N, BLOCK_M], 0.0, gl.float32, ACC)
        before = ()
        for _ in gl.static_range(CHUNK):
            before = before + (gl.full([BLOCK_N, 32], 0.0, DTYPE, LEFT),)
        for k in range(k_begin, k_end):
            stage = count % STAGES
            mbarrier.wait(ready.index(stage), (count // STAGES) & 1)
            words = ()
            if BITS & 12:
                words = words + _plane(fours.index(stage), BLOCK_N, WARPS, 4)
            if BITS & 8:
                words = words + _plane(eights.index(stage), BLOCK_N, WARPS, 4)
            if BITS & 2:
                words = words + _plane(twos.index(stage), BLOCK_N, WARPS, 2)
            if BITS & 1:
                words = words + _plane(ones.index(stage), BLOCK_N, WARPS, 1)
            factor = words[0] * 0 + FACTOR
            if SCALED:
                OF_LANES: gl.constexpr = _scales_layout(BLOCK_N, WARPS, HALVES)
                codes = scale_tiles.index(stage).load(gl.SliceLayout(2, OF_LANES))
                codes = codes.to(gl.uint32, bitcast=True)
                of_lanes, factor = gl.broadcast(codes.expand_dims(2), gl.full([T, 8 * HALVES, 4 // HALVES], FACTOR,
                                                                              gl.uint32, OF_LANES))
                scale_codes = of_lanes.reshape([T, 32])
            tile_of_x = x_tiles.index(stage).permute((1, 0))
            for first in gl.static_range(0, 4, CHUNK):
                weights = ()
                for j in gl.static_range(first, first + CHUNK):
                    if SCALED:
                        factor = ((scale_codes >> (8 * j)) & 0xFF) * SCALE_MUL + SCALE_ADD
                        factor = gl.convert_layout(factor, words[0].type.layout, assert_trivial=True)
                    p0 = _pair(words, factor, 4 * j, MOVES, FIRST, INT, SCALED, BF16, True)[0]
                    p1 = _pair(words, factor, 4 * j + 1, MOVES, FIRST, INT, SCALED, BF16, True)[0]
                    p2 = _pair(words, factor, 4 * j + 2, MOVES, FIRST, INT, SCALED, BF16, True)[0]
                    p3 = _pair(words, factor, 4 * j + 3, MOVES, FIRST, INT, SCALED, BF16, True)[0]
                    lanes = gl.join(gl.join(p0, p1), gl.join(p2, p3)).reshape([T, 8, 4, 2, 2])
                    weight = gl.join(_half(lanes, 0, BF16, True), _half(lanes, 1, BF16, True)).permute(0, 1, 4, 3, 2, 5)
                    weight = gl.convert_layout(weight.reshape([BLOCK_N, 32]), LEFT, assert_trivial=True)
                    weights = weights + (weight,)
                for j in gl.static_range(CHUNK):
                    sums = hopper.warpgroup_mma(weights[j], tile_of_x.slice(32 * (first + j), 32, 0), sums,
                                                is_async=True)
                # Instructions read their registers while they run, and the next columns are decoded into the other half
                # of them: no more than these may be left running. With CHUNK = 4 those are all the same registers: four
                # left running gave results that differ from run to run (H200, Triton 3.6).
                done = hopper.warpgroup_mma_wait(num_outstanding=CHUNK if CHUNK < 4 else 0, deps=(sums,) + before)
                sums = done[0]
                before = weights
                if first == 0:      # nothing of the tile before this one is read any more
                    _barrier()
                    mbarrier.arrive(free.index((count + STAGES - 1) % STAGES), count=1, pred=k > k_begin)
            count += 1
        done = hopper.warpgroup_mma_wait(num_outstanding=0, deps=(sums,) + before)
        sums = done[0]
        if k_end > k_begin:
            _barrier()
            mbarrier.arrive(free.index((count + STAGES - 1) % STAGES), count=1)
            if slot < 0:
                _store(sums, row_scale, out, block_m * BLOCK_M, block_n * BLOCK_N, M, N, ROW_SCALES,
                       DTYPE, ACC, BLOCK_M, BLOCK_N, WARPS)
            else:
                n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, ACC))
                m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, ACC))
                gl.store(parts + slot * (BLOCK_N * BLOCK_M) + (n[:, None] * BLOCK_M + m[None, :]), sums)


@gluon.jit(do_not_specialize=["M", "ROW_SCALES", "PROGRAMS", "FULL", "REST", "K_TILES", "M_BLOCKS", "N_BLOCKS"])
def stream_kernel(
    x_desc, four_desc, two_desc, one_desc, scales_desc, row_scale, out, parts, M, N, ROW_SCALES, PROGRAMS, FULL, REST,
    K_TILES, M_BLOCKS, N_BLOCKS,
    BITS: gl.constexpr, MOVES: gl.constexpr, FIRST: gl.constexpr, INT: gl.constexpr, FACTOR: gl.constexpr,
    SCALES: gl.constexpr, SCALE_MUL: gl.constexpr, SCALE_ADD: gl.constexpr, HALVES: gl.constexpr, BLOCK: gl.constexpr,
    BF16: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
    CHUNK: gl.constexpr, GROUP: gl.constexpr,
):
    """Compute out [M, N] of x [M, 128 K_TILES] as `order_kernel` left it.

    x_desc: blocks [BLOCK_M, 128] of x. four_desc, two_desc, one_desc: blocks of 128, 64 and 32 words of the packed
    weight, int32 [N / 8, K_TILES * 32 BITS], and BLOCK_N / 8 rows; scales_desc of int32 [N / 8, K_TILES * 8 HALVES].
    There are M_BLOCKS N_BLOCKS tiles [BLOCK_M, BLOCK_N]: FULL, a multiple of PROGRAMS, are made whole, and the REST,
    less than PROGRAMS, by all together; or all are made whole, and FULL may be more. Sums of a part of K go to parts
    fp32 [PROGRAMS + REST, BLOCK_N, BLOCK_M]. CHUNK times 32 columns are decoded, then multiplied, at once.
    """
    SCALED: gl.constexpr = SCALES == "codes"
    T: gl.constexpr = BLOCK_N // 8
    DTYPE: gl.constexpr = gl.bfloat16 if BF16 else gl.float16
    gdc_launch_dependents()
    x_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, 128], x_desc.layout)
    fours = x_tiles
    eights = x_tiles
    twos = x_tiles
    ones = x_tiles
    scale_tiles = x_tiles
    if BITS & 12:
        fours = gl.allocate_shared_memory(gl.int32, [STAGES, T, 128], four_desc.layout)
    if BITS & 8:
        eights = gl.allocate_shared_memory(gl.int32, [STAGES, T, 128], four_desc.layout)
    if BITS & 2:
        twos = gl.allocate_shared_memory(gl.int32, [STAGES, T, 64], two_desc.layout)
    if BITS & 1:
        ones = gl.allocate_shared_memory(gl.int32, [STAGES, T, 32], one_desc.layout)
    if SCALED:
        scale_tiles = gl.allocate_shared_memory(gl.int32, [STAGES, T, 8 * HALVES], scales_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    hopper.fence_async_shared()
    _barrier()
    gl.warp_specialize([
        (_multiply, (x_tiles, fours, eights, twos, ones, scale_tiles, ready, free, row_scale, out, parts, M, N,
                     ROW_SCALES, PROGRAMS, FULL, REST, K_TILES, M_BLOCKS, N_BLOCKS, BITS, MOVES, FIRST, INT, FACTOR,
                     SCALED, SCALE_MUL, SCALE_ADD, HALVES, BF16, BLOCK_M, BLOCK_N, STAGES, WARPS, CHUNK, GROUP)),
        (_copy, (x_desc, four_desc, two_desc, one_desc, scales_desc, x_tiles, fours, eights, twos, ones, scale_tiles,
                 ready, free, PROGRAMS, FULL, REST, K_TILES, M_BLOCKS, N_BLOCKS, BITS, SCALED, HALVES, BLOCK_M,
                 BLOCK_N, STAGES, GROUP)),
    ], [1], [24])


@triton.jit
def _sharing(number, PROGRAMS, REST, K_TILES):
    """Return the first and the last program that have a part of tile FULL + `number`."""
    first = number * K_TILES        # of the REST K_TILES steps that the programs share out
    work = REST * K_TILES
    return ((first + 1) * PROGRAMS - 1) // work, ((first + K_TILES) * PROGRAMS - 1) // work


@triton.jit
def _has_work(program, PROGRAMS, REST, K_TILES):
    return (program + 1) * (REST * K_TILES) // PROGRAMS > program * (REST * K_TILES) // PROGRAMS


@triton.jit(do_not_specialize=["M", "ROW_SCALES", "PROGRAMS", "FULL", "REST", "K_TILES", "M_BLOCKS", "N_BLOCKS"])
def reduce_kernel(parts, row_scale, out, M, N, ROW_SCALES, PROGRAMS, FULL, REST, K_TILES, M_BLOCKS, N_BLOCKS,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
                  COLUMNS: tl.constexpr):
    """Add up the parts of the tiles that `stream_kernel` left: COLUMNS x ROWS of a tile to a program."""
    number = tl.program_id(0)
    first_program, last_program = _sharing(number, PROGRAMS, REST, K_TILES)
    n_inner = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_inner = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    place = n_inner[:, None] * BLOCK_M + m_inner[None, :]
    total = tl.zeros([COLUMNS, ROWS], tl.float32)
    gdc_wait()
    for four in range(first_program, last_program + 1, 4):      # loads of four parts are on their way at once
        for i in tl.static_range(4):
            program = four + i
            there = (program <= last_program) & _has_work(program, PROGRAMS, REST, K_TILES)
            total += tl.load(parts + (program + number) * (BLOCK_N * BLOCK_M) + place, mask=there & (place >= 0),
                             other=0.0)
    tile = FULL + number
    first_m = tile // (GROUP * N_BLOCKS) * GROUP
    height = tl.minimum(M_BLOCKS - first_m, GROUP)
    inner = tile - first_m * N_BLOCKS
    m = (first_m + inner % height) * BLOCK_M + m_inner
    n = inner // height * BLOCK_N + n_inner
    total = total * tl.load(row_scale + tl.minimum(n, N - 1) * ROW_SCALES)[:, None]
    tl.store(out + m.to(tl.int64)[:, None] * N + n[None, :], tl.trans(total).to(out.dtype.element_ty),
             mask=(m < M)[:, None] & (n < N)[None, :])

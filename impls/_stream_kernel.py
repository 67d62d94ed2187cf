"""x [M, K] @ weight.T for many rows of x on sm_90, from the weights of `_fragment_kernel`, by wgmma (Gluon).

One warp copies tiles of x and of the packed weight into shared memory, several ahead, by bulk tensor copies. The other
warps take codes from there into registers, decode them to what the matrix instruction takes as its left operand, and
multiply while the next 32 columns are decoded; x is read by the instruction itself, as it lies in memory. The layout
has 8 neighbouring columns of a row in one lane, and the instruction takes two from each of four lanes: so each of the
four loads the words that hold its pairs of all four lanes' columns (`fpxbench.numbers.packing.fragment`). There are one
or two programs per multiprocessor. Each makes whole tiles of the result as long as there is one for every program; the
K of the remaining tiles is divided evenly among them (`_fragment.divided`), and `reduce_kernel` adds up their sums, in
order.

Imported on request only: it needs Triton 3.6 or later, with the NVIDIA backend.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from fpxbench.impls._triton_modules import kernels

_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier     # renamed in Triton 3.7
_bulk_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared     # and this
# The decode is `_fragment_kernel`'s. Gluon's own library reuses Triton's functions in the same way.
_fragment = kernels("_fragment_kernel", False)
_pair, _half = gluon.jit(_fragment._pair.fn), gluon.jit(_fragment._half.fn)
_launch_dependents = gluon.jit(_fragment._launch_dependents.fn)
_wait_for_kernels_before = gluon.jit(_fragment._wait_for_kernels_before.fn)
_launch_dependents_triton, _wait_triton = _fragment._launch_dependents, _fragment._wait_for_kernels_before


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
def _words_layout(block_n, warps):
    """Return the layout of one word for each lane: [BLOCK_N / 8, 32]."""
    registers, of_warps = _rows(block_n, warps, 2)
    return gl.DistributedLinearLayout(registers, [[0, 1 << i] for i in range(5)], of_warps, [], [block_n // 8, 32])


@gluon.constexpr_function
def _shared_layout(block_n, warps, lines, owners):
    """Return the layout of words in shared memory, [BLOCK_N / 8, LINES, 32, OWNERS]: lane 4 r + w takes, of the lanes
    4 r to 4 r + 3, the words that have pairs of w. Neighbouring OWNERS of the four take the same ones.

    A lane has 4 / OWNERS words in each plane, so that number LANE W + I of a plane's words is word I of a lane.
    """
    registers, of_warps = _rows(block_n, warps, 4)
    each = 4 // owners

    def of_word(number):
        return [0, number // 32, number % 32, 0]

    from_lanes = [of_word(each << i) for i in range(2)] + [[0, 4, 0, 0]] * (lines == 8)
    sharing = [[0, 0, 0, 1 << i] for i in range(owners.bit_length() - 1)]
    own = [of_word(1 << i) for i in range(each.bit_length() - 1)]
    rows = [of_word(4 * each << i) for i in range(3)]
    return gl.DistributedLinearLayout(from_lanes + registers, sharing + own + rows, of_warps, [],
                                      [block_n // 8, lines, 32, owners])


@gluon.constexpr_function
def _scales_layout(block_n, warps, halves):
    """Return the layout of [BLOCK_N / 8, 8 halves, 4]: each lane has all words of its row."""
    registers, of_warps = _rows(block_n, warps, 3)
    lanes = [[0, 0, 1], [0, 0, 2]] + [[0, halves << i, 0] for i in range(3)]
    return gl.DistributedLinearLayout([[0, 1, 0]] * (halves - 1) + registers, lanes, of_warps, [],
                                      [block_n // 8, 8 * halves, 4])


@gluon.jit
def _halves(value):
    """Return a tensor's two halves along its last dimension."""
    ROWS: gl.constexpr = value.shape[0]
    COLUMNS: gl.constexpr = value.shape[1]
    return value.reshape([ROWS, 2, COLUMNS // 2]).permute(0, 2, 1).split()


@gluon.jit
def _own_words(place, BLOCK_N: gl.constexpr, WARPS: gl.constexpr, LINES: gl.constexpr, OWNERS: gl.constexpr):
    """Load words [BLOCK_N / 8, LINES, 32] from shared memory: of each of four lanes a tuple with a uint32 [BLOCK_N / 8,
    32] for each plane. Those that OWNERS share are shifted, so that this lane's bits are the lowest of each half."""
    T: gl.constexpr = BLOCK_N // 8
    ONE: gl.constexpr = _words_layout(BLOCK_N, WARPS)
    FULL: gl.constexpr = _shared_layout(BLOCK_N, WARPS, LINES, OWNERS)
    PLANES: gl.constexpr = 2 if LINES == 8 else 1
    words = place.load(gl.SliceLayout(3, FULL)).to(gl.uint32, bitcast=True).expand_dims(3)
    if OWNERS > 1:
        words = gl.broadcast(words, gl.full([T, LINES, 32, OWNERS], 0, gl.uint32, FULL))[0]
    words = words.reshape([T, PLANES, 8, 4, 4]).permute(0, 2, 4, 1, 3).reshape([T, 32, PLANES * 4])
    even, odd = words.reshape([T, 32, PLANES * 2, 2]).split()
    lane0, lane2 = even.reshape([T, 32, PLANES, 2]).split()
    lane1, lane3 = odd.reshape([T, 32, PLANES, 2]).split()
    lanes = (lane0, lane1, lane2, lane3)
    result = ()
    for lane in gl.static_range(4):
        if PLANES == 2:
            low, high = lanes[lane].split()
            result = result + ((gl.convert_layout(low, ONE, assert_trivial=True),
                                gl.convert_layout(high, ONE, assert_trivial=True)),)
        else:
            own = gl.convert_layout(lanes[lane].reshape([T, 32]), ONE, assert_trivial=True)
            if OWNERS > 1:
                own = own >> ((gl.arange(0, 32, gl.SliceLayout(0, ONE)) % OWNERS) * (16 // OWNERS))[None, :]
            result = result + ((own,),)
    return result


@gluon.jit
def _with(words, more):
    """Return the tuples of four lanes, each with what `more` has for the lane."""
    return (words[0] + more[0], words[1] + more[1], words[2] + more[2], words[3] + more[3])


@gluon.jit
def _scale_words(place, BLOCK_N: gl.constexpr, WARPS: gl.constexpr, HALVES: gl.constexpr):
    """Load a row's words of scale codes from shared memory [BLOCK_N / 8, 8 HALVES]: for each of four lanes its word."""
    T: gl.constexpr = BLOCK_N // 8
    ONE: gl.constexpr = _words_layout(BLOCK_N, WARPS)
    FULL: gl.constexpr = _scales_layout(BLOCK_N, WARPS, HALVES)
    codes = place.load(gl.SliceLayout(2, FULL)).to(gl.uint32, bitcast=True).expand_dims(2)
    codes = gl.broadcast(codes, gl.full([T, 8 * HALVES, 4], 0, gl.uint32, FULL))[0]
    codes = codes.reshape([T, 8, HALVES, 4]).permute(0, 1, 3, 2).reshape([T, 32, HALVES])
    if HALVES == 2:
        low, high = codes.split()
        low = gl.convert_layout(low, ONE, assert_trivial=True)
        high = gl.convert_layout(high, ONE, assert_trivial=True)
        return low, low, high, high
    else:
        codes = gl.convert_layout(codes.reshape([T, 32]), ONE, assert_trivial=True)
        return codes, codes, codes, codes


@gluon.jit
def _place(item, PROGRAMS, SHARING, FULL, REST, K_TILES, M_BLOCKS, N_BLOCKS, GROUP: gl.constexpr):
    """Return a program's tile number `item`: its blocks along m and n, its part of K, and where a part's sums go (-1:
    none)."""
    pid = gl.program_id(0)
    whole = FULL // PROGRAMS
    begin = pid * (REST * K_TILES) // SHARING
    end = (pid + 1) * (REST * K_TILES) // SHARING
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


@triton.jit
def _sharing(number, SHARING, REST, K_TILES):
    """Return the first and the last program that have a part of tile FULL + `number`."""
    first = number * K_TILES        # of the REST K_TILES steps, at least SHARING, that are shared out
    work = REST * K_TILES
    return ((first + 1) * SHARING - 1) // work, ((first + K_TILES) * SHARING - 1) // work


@gluon.jit
def _copy(sources, places, counts, BITS: gl.constexpr, SCALED: gl.constexpr, HALVES: gl.constexpr,
          BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
          OVERLAP: gl.constexpr, SLICES: gl.constexpr, WARPS: gl.constexpr):
    x_desc, four_desc, two_desc, one_desc, scales_desc = sources
    x_tiles, fours, twos, ones, scale_tiles, ready, free = places
    PROGRAMS, SHARING, FULL, REST, K_TILES, M_BLOCKS, N_BLOCKS = counts
    if OVERLAP != "none":
        _wait_for_kernels_before()
    if OVERLAP != "late":
        _launch_dependents()
    T: gl.constexpr = BLOCK_N // 8
    BYTES: gl.constexpr = BLOCK_M * 256 + T * 128 * BITS + (T * 32 * HALVES if SCALED else 0)
    count = 0
    for item in range(FULL // PROGRAMS + 2):
        block_m, block_n, k_begin, k_end, slot = _place(item, PROGRAMS, SHARING, FULL, REST, K_TILES, M_BLOCKS,
                                                        N_BLOCKS, GROUP)
        for k in range(k_begin, k_end):
            stage = count % STAGES
            mbarrier.wait(free.index(stage), ((count // STAGES) & 1) ^ 1)
            if WARPS > 1:       # no warp may still wait when the barrier is two phases ahead
                _barrier()
            full = ready.index(stage)
            mbarrier.expect(full, BYTES)
            line = k * BITS
            for of_slice in gl.static_range(SLICES):
                n = block_n * T + of_slice * (T // SLICES)
                place = stage * SLICES + of_slice
                if BITS & 12:
                    _bulk_copy(four_desc, [n, line, 0], full, fours.index(place))
                if BITS & 2:
                    _bulk_copy(two_desc, [n, line + (BITS & 4), 0], full, twos.index(place))
                if BITS & 1:
                    _bulk_copy(one_desc, [n, line + (BITS & 6), 0], full, ones.index(place))
                if SCALED:
                    _bulk_copy(scales_desc, [n, k * (8 * HALVES)], full, scale_tiles.index(place))
            _bulk_copy(x_desc, [block_m * BLOCK_M, k * 128], full, x_tiles.index(stage))
            count += 1
    if OVERLAP == "late":
        _launch_dependents()


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
def _multiply(places, results, counts, BITS: gl.constexpr, MOVES: gl.constexpr, FIRST: gl.constexpr, INT: gl.constexpr,
              FACTOR: gl.constexpr, SCALED: gl.constexpr, SCALE_MUL: gl.constexpr, SCALE_ADD: gl.constexpr,
              HALVES: gl.constexpr, BF16: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
              STAGES: gl.constexpr, WARPS: gl.constexpr, CHUNK: gl.constexpr, GROUP: gl.constexpr,
              OVERLAP: gl.constexpr, TEAMS: gl.constexpr, SLICES: gl.constexpr, WORKER: gl.constexpr):
    x_tiles, fours, twos, ones, scale_tiles, ready, free = places
    meeting, there, taken, row_scale, out, parts, M, N, ROW_SCALES = results
    PROGRAMS, SHARING, FULL, REST, K_TILES, M_BLOCKS, N_BLOCKS = counts
    if OVERLAP != "none":
        _wait_for_kernels_before()
    T: gl.constexpr = BLOCK_N // 8
    DTYPE: gl.constexpr = gl.bfloat16 if BF16 else gl.float16
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    TEAM: gl.constexpr = WORKER % TEAMS
    SLICE: gl.constexpr = WORKER // TEAMS
    count = 0
    meetings = 0
    for item in range(FULL // PROGRAMS + 2):
        block_m, block_n, k_begin, k_end, slot = _place(item, PROGRAMS, SHARING, FULL, REST, K_TILES, M_BLOCKS,
                                                        N_BLOCKS, GROUP)
        sums = gl.full([BLOCK_N, BLOCK_M], 0.0, gl.float32, ACC)
        before = ()
        for _ in gl.static_range(CHUNK):
            before = before + (gl.full([BLOCK_N, 32], 0.0, DTYPE, LEFT),)
        for k in range(k_begin + TEAM, k_end, TEAMS):
            number = count + (k - k_begin)
            stage = number % STAGES
            mbarrier.wait(ready.index(stage), (number // STAGES) & 1)
            place = stage * SLICES + SLICE
            words = ((), (), (), ())
            if BITS & 12:
                words = _with(words, _own_words(fours.index(place), BLOCK_N, WARPS, BITS & 12, 1))
            if BITS & 2:
                words = _with(words, _own_words(twos.index(place), BLOCK_N, WARPS, 2, 2))
            if BITS & 1:
                words = _with(words, _own_words(ones.index(place), BLOCK_N, WARPS, 1, 4))
            if SCALED:
                scale_words = _scale_words(scale_tiles.index(place), BLOCK_N, WARPS, HALVES)
            tile_of_x = x_tiles.index(stage).permute((1, 0))
            for first in gl.static_range(0, 4, CHUNK):
                weights = ()
                for j in gl.static_range(first, first + CHUNK):
                    # Of columns 32 j + 8 lane to 32 j + 8 lane + 7, each of four lanes decodes one pair.
                    pairs = ()
                    for lane in gl.static_range(4):
                        factor = words[lane][0] * 0 + FACTOR
                        if SCALED:
                            factor = ((scale_words[lane] >> (8 * j)) & 0xFF) * SCALE_MUL + SCALE_ADD
                        pairs = pairs + (_pair(words[lane], factor, j, MOVES, FIRST, INT, SCALED, BF16, True)[0],)
                    p0, p1, p2, p3 = pairs
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
                if first == 0:      # the previous tile is no longer read
                    _barrier()
                    mbarrier.arrive(free.index((number + STAGES - TEAMS) % STAGES), count=1,
                                    pred=k >= k_begin + TEAMS)
        done = hopper.warpgroup_mma_wait(num_outstanding=0, deps=(sums,) + before)
        sums = done[0]
        steps = k_end - k_begin
        if steps > TEAM:
            _barrier()
            last = count + TEAM + (steps - 1 - TEAM) // TEAMS * TEAMS
            mbarrier.arrive(free.index(last % STAGES), count=1)
        count += steps
        if TEAMS == 2:      # noqa: SIM102 (this condition is the compiler's)
            if steps > 1:
                if TEAM == 1:
                    mbarrier.wait(taken, (meetings & 1) ^ 1)
                    meeting.store(sums)
                    _barrier()
                    mbarrier.arrive(there, count=1)
                else:
                    mbarrier.wait(there, meetings & 1)
                    sums += meeting.load(ACC)
                    _barrier()
                    mbarrier.arrive(taken, count=1)
                meetings += 1
        if TEAM == 0 and steps > 0:
            if slot < 0:
                _store(sums, row_scale, out, block_m * BLOCK_M, (block_n * SLICES + SLICE) * BLOCK_N, M, N, ROW_SCALES,
                       DTYPE, ACC, BLOCK_M, BLOCK_N, WARPS)
            else:
                n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, ACC))
                m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, ACC))
                gl.store(parts + (slot * SLICES + SLICE) * (BLOCK_N * BLOCK_M) + (n[:, None] * BLOCK_M + m[None, :]),
                         sums)


@gluon.jit(do_not_specialize=["M", "ROW_SCALES", "PROGRAMS", "SHARING", "FULL", "REST", "K_TILES", "M_BLOCKS",
                              "N_BLOCKS"])
def stream_kernel(
    x_desc, four_desc, two_desc, one_desc, scales_desc, row_scale, out, parts, M, N, ROW_SCALES, PROGRAMS, SHARING,
    FULL, REST, K_TILES, M_BLOCKS, N_BLOCKS,
    BITS: gl.constexpr, MOVES: gl.constexpr, FIRST: gl.constexpr, INT: gl.constexpr, FACTOR: gl.constexpr,
    SCALES: gl.constexpr, SCALE_MUL: gl.constexpr, SCALE_ADD: gl.constexpr, HALVES: gl.constexpr, BLOCK: gl.constexpr,
    BF16: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
    CHUNK: gl.constexpr, GROUP: gl.constexpr, OVERLAP: gl.constexpr, TEAMS: gl.constexpr, SLICES: gl.constexpr,
):
    """Compute out [M, N] of x [M, K], where K_TILES tiles of 128 columns have K of them.

    x_desc: blocks [BLOCK_M, 128] of x. four_desc, two_desc, one_desc: blocks of BLOCK_N / (8 SLICES) rows and 8 or 4, 2
    and 1 lines of the packed weight, int32 [N / 8, BITS K_TILES, 32]; scales_desc of int32 [N / 8, K_TILES * 8 HALVES].
    MOVES and FIRST: those of the four pairs that share words.
    There are M_BLOCKS N_BLOCKS tiles [BLOCK_M, BLOCK_N]: FULL, a multiple of PROGRAMS, are made whole, and the REST,
    less than PROGRAMS, by SHARING of them together; or all are made whole, and FULL may be more. Sums of a part of K
    go to parts fp32 [PROGRAMS + REST, BLOCK_N, BLOCK_M]. CHUNK times 32 columns are decoded, then multiplied, at once.
    """
    SCALED: gl.constexpr = SCALES == "codes"
    T: gl.constexpr = BLOCK_N // 8
    DTYPE: gl.constexpr = gl.bfloat16 if BF16 else gl.float16
    x_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, 128], x_desc.layout)
    fours = x_tiles
    twos = x_tiles
    ones = x_tiles
    scale_tiles = x_tiles
    if BITS & 12:
        fours = gl.allocate_shared_memory(gl.int32, [STAGES * SLICES, T // SLICES, BITS & 12, 32], four_desc.layout)
    if BITS & 2:
        twos = gl.allocate_shared_memory(gl.int32, [STAGES * SLICES, T // SLICES, 2, 32], two_desc.layout)
    if BITS & 1:
        ones = gl.allocate_shared_memory(gl.int32, [STAGES * SLICES, T // SLICES, 1, 32], one_desc.layout)
    if SCALED:
        scale_tiles = gl.allocate_shared_memory(gl.int32, [STAGES * SLICES, T // SLICES, 8 * HALVES],
                                                scales_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    meeting = x_tiles
    there = ready
    taken = free
    if TEAMS == 2:
        meeting = gl.allocate_shared_memory(gl.float32, [BLOCK_N, BLOCK_M], gl.SwizzledSharedLayout(2, 4, 8, [1, 0]))
        there = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        taken = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(there, count=1)
        mbarrier.init(taken, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=SLICES)
    hopper.fence_async_shared()
    _barrier()
    places = (x_tiles, fours, twos, ones, scale_tiles, ready, free)
    counts = (PROGRAMS, SHARING, FULL, REST, K_TILES, M_BLOCKS, N_BLOCKS)
    sources = (x_desc, four_desc, two_desc, one_desc, scales_desc)
    results = (meeting, there, taken, row_scale, out, parts, M, N, ROW_SCALES)
    # The assembler serializes products that need more registers than the group with the fewest has. Workers get the
    # registers requested here, the first group the rest: so the first group copies where products need nearly all.
    if SLICES == 3:
        gl.warp_specialize([
            (_copy, (sources, places, counts, BITS, SCALED, HALVES, BLOCK_M, BLOCK_N, STAGES, GROUP, OVERLAP, SLICES,
                     WARPS)),
            (_multiply, (places, results, counts, BITS, MOVES, FIRST, INT, FACTOR, SCALED, SCALE_MUL, SCALE_ADD, HALVES,
                         BF16, BLOCK_M, BLOCK_N // SLICES, STAGES, WARPS, CHUNK, GROUP, OVERLAP, TEAMS, SLICES, 0)),
            (_multiply, (places, results, counts, BITS, MOVES, FIRST, INT, FACTOR, SCALED, SCALE_MUL, SCALE_ADD, HALVES,
                         BF16, BLOCK_M, BLOCK_N // SLICES, STAGES, WARPS, CHUNK, GROUP, OVERLAP, TEAMS, SLICES, 1)),
            (_multiply, (places, results, counts, BITS, MOVES, FIRST, INT, FACTOR, SCALED, SCALE_MUL, SCALE_ADD, HALVES,
                         BF16, BLOCK_M, BLOCK_N // SLICES, STAGES, WARPS, CHUNK, GROUP, OVERLAP, TEAMS, SLICES, 2)),
        ], [WARPS, WARPS, WARPS], [152, 152, 152])
    elif TEAMS * SLICES == 2 and (SLICES == 2 or BLOCK_M >= 128):
        gl.warp_specialize([
            (_copy, (sources, places, counts, BITS, SCALED, HALVES, BLOCK_M, BLOCK_N, STAGES, GROUP, OVERLAP, SLICES,
                     WARPS)),
            (_multiply, (places, results, counts, BITS, MOVES, FIRST, INT, FACTOR, SCALED, SCALE_MUL, SCALE_ADD, HALVES,
                         BF16, BLOCK_M, BLOCK_N // SLICES, STAGES, WARPS, CHUNK, GROUP, OVERLAP, TEAMS, SLICES, 0)),
            (_multiply, (places, results, counts, BITS, MOVES, FIRST, INT, FACTOR, SCALED, SCALE_MUL, SCALE_ADD, HALVES,
                         BF16, BLOCK_M, BLOCK_N // SLICES, STAGES, WARPS, CHUNK, GROUP, OVERLAP, TEAMS, SLICES, 1)),
        ], [WARPS, WARPS], [224, 224])
    elif TEAMS == 2:
        gl.warp_specialize([
            (_multiply, (places, results, counts, BITS, MOVES, FIRST, INT, FACTOR, SCALED, SCALE_MUL, SCALE_ADD, HALVES,
                         BF16, BLOCK_M, BLOCK_N // SLICES, STAGES, WARPS, CHUNK, GROUP, OVERLAP, TEAMS, SLICES, 0)),
            (_multiply, (places, results, counts, BITS, MOVES, FIRST, INT, FACTOR, SCALED, SCALE_MUL, SCALE_ADD, HALVES,
                         BF16, BLOCK_M, BLOCK_N // SLICES, STAGES, WARPS, CHUNK, GROUP, OVERLAP, TEAMS, SLICES, 1)),
            (_copy, (sources, places, counts, BITS, SCALED, HALVES, BLOCK_M, BLOCK_N, STAGES, GROUP, OVERLAP, SLICES,
                     1)),
        ], [WARPS, 1], [200, 96])
    else:
        gl.warp_specialize([
            (_multiply, (places, results, counts, BITS, MOVES, FIRST, INT, FACTOR, SCALED, SCALE_MUL, SCALE_ADD, HALVES,
                         BF16, BLOCK_M, BLOCK_N // SLICES, STAGES, WARPS, CHUNK, GROUP, OVERLAP, TEAMS, SLICES, 0)),
            (_copy, (sources, places, counts, BITS, SCALED, HALVES, BLOCK_M, BLOCK_N, STAGES, GROUP, OVERLAP, SLICES,
                     1)),
        ], [1], [24])


@triton.jit(do_not_specialize=["M", "ROW_SCALES", "PROGRAMS", "SHARING", "FULL", "REST", "K_TILES", "M_BLOCKS",
                               "N_BLOCKS"])
def reduce_kernel(parts, row_scale, out, M, N, ROW_SCALES, PROGRAMS, SHARING, FULL, REST, K_TILES, M_BLOCKS, N_BLOCKS,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
                  COLUMNS: tl.constexpr):
    """Add up the parts of the tiles that `stream_kernel` left: COLUMNS x ROWS of a tile per program."""
    number = tl.program_id(0)
    first_program, last_program = _sharing(number, SHARING, REST, K_TILES)
    n_inner = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_inner = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    place = n_inner[:, None] * BLOCK_M + m_inner[None, :]
    total = tl.zeros([COLUMNS, ROWS], tl.float32)
    tile = FULL + number
    first_m = tile // (GROUP * N_BLOCKS) * GROUP
    height = tl.minimum(M_BLOCKS - first_m, GROUP)
    inner = tile - first_m * N_BLOCKS
    m = (first_m + inner % height) * BLOCK_M + m_inner
    n = inner // height * BLOCK_N + n_inner
    _wait_triton()
    _launch_dependents_triton()
    scale = tl.load(row_scale + tl.minimum(n, N - 1) * ROW_SCALES)
    for four in range(first_program, last_program + 1, 4):      # loads of four parts are in flight at once
        for i in tl.static_range(4):
            program = four + i
            total += tl.load(parts + (program + number) * (BLOCK_N * BLOCK_M) + place,
                             mask=(program <= last_program) & (place >= 0), other=0.0)
    total = total * scale[:, None]
    tl.store(out + m.to(tl.int64)[:, None] * N + n[None, :], tl.trans(total).to(out.dtype.element_ty),
             mask=(m < M)[:, None] & (n < N)[None, :])

# ruff: noqa: SIM108 (both branches of a conditional expression are compiled)
"""x [M, K] @ weight.T for few rows of x, from a weight in the order of the matrix instructions' operands.

The layout is `fpxbench.numbers.packing.fragment`. The packed weight goes from memory into the registers that decode it,
16 bytes per load and thread, and from there into the matrix instruction (``mma.sync``): no shared memory, no exchange
between threads. x comes through the L1 cache, in the same order. The warps of a program share its rows of the weight
and divide K among them; their sums meet once, at the end, in a fixed order. On sm_90 a weight costs about 3
instructions of any kind, at M up to 16 and in any width: 0.75 (int8) to 1.9 of decode, 0.5 of scaling.

Without PTX (Triton's interpreter) the same is computed in fp32. Only Triton builtins and helpers of this file are
called: the interpreter runs a second copy of this module, which cannot call Triton's own compiled functions.
"""

import triton
import triton.language as tl


@triton.jit
def _load_four(pointers):
    """Load four words from each address, past the L1 cache, which is left to x.

    No load is a non-coherent one: the assembler would be free to move it before the wait for the kernel that writes
    what is loaded, or far behind a wait that it precedes.
    """
    return tl.inline_asm_elementwise(
        "ld.global.L1::no_allocate.L2::128B.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l",
        [pointers.to(tl.int64)], dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1)


@triton.jit
def _load_two(pointers):
    return tl.inline_asm_elementwise(
        "ld.global.L1::no_allocate.L2::128B.v2.b32 {$0, $1}, [$2];", "=r,=r,l", [pointers.to(tl.int64)],
        dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1)


@triton.jit
def _load_one(pointers):
    return tl.inline_asm_elementwise(
        "ld.global.L1::no_allocate.L2::64B.b32 $0, [$1];", "=r,l", [pointers.to(tl.int64)],
        dtype=tl.uint32, is_pure=True, pack=1)


@triton.jit
def _load_words(pointers, COUNT: tl.constexpr, PTX: tl.constexpr):
    """Return a tuple of COUNT (1, 2 or 4) uint32, of neighbours from `pointers` up, each in the shape of `pointers`."""
    if not PTX:
        words = ()
        for word in tl.static_range(COUNT):
            words = words + (tl.load(pointers + word).to(tl.uint32, bitcast=True),)
        return words
    elif COUNT == 4:
        return _load_four(pointers)
    elif COUNT == 2:
        return _load_two(pointers)
    else:
        return (_load_one(pointers),)


@triton.jit
def _load_x(pointers, PTX: tl.constexpr):
    """Load eight 16-bit numbers from each address, as four words; kept in the L1 cache."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ld.global.L1::evict_last.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [pointers.to(tl.int64)],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1)
    else:
        return _load_words(pointers.to(tl.pointer_type(tl.int32), bitcast=True), 4, PTX)


@triton.jit
def _load_x_tile(x_pointers, zeros, k_tile, along_k, K_TILES, STEP, OF_TILE, BLOCK_M: tl.constexpr, W: tl.constexpr,
                 ORDERED: tl.constexpr, TAIL: tl.constexpr, PTX: tl.constexpr):
    """Return the activation's words for 128 columns: four tuples, one for each 32 columns, as `_load_x` returns them.
    OF_TILE elements lie between tiles, STEP between those four."""
    at = x_pointers + k_tile * OF_TILE
    if TAIL:
        lane = tl.arange(0, 4)[:, None, None, None]
        at = tl.where(k_tile + along_k < K_TILES, at, zeros + lane * 8)
    if BLOCK_M == 8:
        at = tl.reshape(at, [4, 8, W])
    return (_load_x(at, PTX), _load_x(at + STEP, PTX), _load_x(at + 2 * STEP, PTX), _load_x(at + 3 * STEP, PTX))


@triton.jit
def _load_tiles(packed, scales, tiles, BITS: tl.constexpr, SCALED: tl.constexpr, HALVES: tl.constexpr,
                PTX: tl.constexpr):
    """Return the words of tiles [1, W, G], a tuple of BITS uint32 [32, W, G]; and one of scale codes if SCALED."""
    lane = tl.arange(0, 32)[:, None, None]
    words = tiles * (BITS * 32)         # added last: the rest of the address is the same for every tile
    loaded = ()
    if BITS & 12:
        loaded = loaded + _load_words(packed + lane * 4 + words, 4, PTX)
    if BITS == 8:
        loaded = loaded + _load_words(packed + (128 + lane * 4) + words, 4, PTX)
    if BITS & 2:
        loaded = loaded + _load_words(packed + ((BITS & 4) * 32 + lane * 2) + words, 2, PTX)
    if BITS & 1:
        loaded = loaded + _load_words(packed + ((BITS & 6) * 32 + lane) + words, 1, PTX)
    if SCALED:
        row = lane // 4 * HALVES + lane % 4 * HALVES // 4
        loaded = loaded + _load_words(scales + row + tiles * (8 * HALVES), 1, PTX)
    return loaded


@triton.jit
def _factor(scale_codes, J: tl.constexpr, SCALE_MUL: tl.constexpr, SCALE_ADD: tl.constexpr, PTX: tl.constexpr):
    """Return the 16-bit float, in both halves of a uint32, of byte J of words of scale codes."""
    if PTX:     # the byte, twice, by one instruction
        byte = tl.inline_asm_elementwise(f"prmt.b32 $0, $1, 0, 0x4{J}4{J};", "=r,r", [scale_codes], dtype=tl.uint32,
                                         is_pure=True, pack=1)
        return byte * (SCALE_MUL & 0xFFFF) + SCALE_ADD
    else:
        return ((scale_codes >> (8 * J)) & 0xFF) * SCALE_MUL + SCALE_ADD


@triton.jit
def _moved(words, MOVES: tl.constexpr, MOVE: tl.constexpr):
    WORD: tl.constexpr = MOVES[MOVE][0]
    SHIFT: tl.constexpr = MOVES[MOVE][1]
    MASK: tl.constexpr = MOVES[MOVE][2] * 0x10001
    if SHIFT >= 0:
        return (words[WORD] << SHIFT) & MASK
    else:
        return (words[WORD] >> (-SHIFT)) & MASK


@triton.jit
def _fma_lanes(a, b, c, BF16: tl.constexpr):
    """Return a * b + c in both 16-bit halves; exact here, subnormal numbers included."""
    if BF16:
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.uint32, is_pure=True, pack=1)
    else:
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.uint32, is_pure=True, pack=1)


@triton.jit
def _half(lanes, HALF: tl.constexpr, BF16: tl.constexpr, PTX: tl.constexpr):
    """Return the number in one half of uint32 `lanes`: of its own 16 bits, or fp32 without PTX."""
    if not PTX and BF16:    # by a shift: the interpreter flushes subnormal bf16
        if HALF:
            return (lanes & 0xFFFF0000).to(tl.float32, bitcast=True)
        else:
            return (lanes << 16).to(tl.float32, bitcast=True)
    bits = (lanes >> (16 * HALF)).to(tl.uint16)
    if not PTX:
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
    elif BF16:
        return bits.to(tl.bfloat16, bitcast=True)
    else:
        return bits.to(tl.float16, bitcast=True)


@triton.jit
def _pair(words, factor, PAIR: tl.constexpr, MOVES: tl.constexpr, FIRST: tl.constexpr, INT: tl.constexpr,
          SCALED: tl.constexpr, BF16: tl.constexpr, PTX: tl.constexpr):
    """Return one pair of weights: with PTX (lanes, lanes), two 16-bit floats in a uint32; without, two fp32."""
    START: tl.constexpr = FIRST[PAIR]
    END: tl.constexpr = FIRST[PAIR + 1]
    lanes = _moved(words, MOVES, START)
    for move in tl.static_range(START + 1, END):
        lanes |= _moved(words, MOVES, move)
    if INT != 0:        # 2**m + low bits, minus 2**m and the sign bit's value; INT is the sign bit
        ONE: tl.constexpr = 0x43004300 if BF16 else 0x64006400
        low = (lanes & ((INT - 1) * 0x10001)) | ONE
        high = (lanes & (INT * 0x10001)) | (ONE | 0x80008000)
        if PTX:
            lanes = _fma_lanes(low, low * 0 + (0x3F803F80 if BF16 else 0x3C003C00), high, BF16)
            if SCALED:
                lanes = _fma_lanes(lanes, factor, lanes * 0 + 0x80008000, BF16)
            return lanes, lanes
        else:
            lower = _half(low, 0, BF16, PTX) + _half(high, 0, BF16, PTX)
            upper = _half(low, 1, BF16, PTX) + _half(high, 1, BF16, PTX)
            if SCALED:
                lower = lower * _half(factor, 0, BF16, PTX)
                upper = upper * _half(factor, 1, BF16, PTX)
            return lower, upper
    elif PTX:
        lanes = _fma_lanes(lanes, factor, lanes * 0 + 0x80008000, BF16)
        return lanes, lanes
    else:
        return (_half(lanes, 0, BF16, PTX) * _half(factor, 0, BF16, PTX),
                _half(lanes, 1, BF16, PTX) * _half(factor, 1, BF16, PTX))


@triton.jit
def _by_four(p0, p1, p2, p3, G: tl.constexpr, W: tl.constexpr):
    """Return words [32, W, G] each as [8 rows, 4 lanes, W, G, 2 (w's low bit), 2 (its high bit)]."""
    joined = tl.join(tl.join(p0, p1), tl.join(p2, p3))
    return tl.reshape(joined, [8, 4, W, G, 2, 2])


@triton.jit
def _weights(words, factor, J: tl.constexpr, MOVES: tl.constexpr, FIRST: tl.constexpr, INT: tl.constexpr,
             SCALED: tl.constexpr, BF16: tl.constexpr, PTX: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
             LEFT: tl.constexpr = False):
    """Return columns 32 J to 32 J + 31 of the tiles, in the instruction's order: [W, 32, 8 G], its right operand; or if
    LEFT, [W, 8 G, 32]."""
    a0, b0 = _pair(words, factor, 4 * J, MOVES, FIRST, INT, SCALED, BF16, PTX)
    a1, b1 = _pair(words, factor, 4 * J + 1, MOVES, FIRST, INT, SCALED, BF16, PTX)
    a2, b2 = _pair(words, factor, 4 * J + 2, MOVES, FIRST, INT, SCALED, BF16, PTX)
    a3, b3 = _pair(words, factor, 4 * J + 3, MOVES, FIRST, INT, SCALED, BF16, PTX)
    if PTX:
        lanes = _by_four(a0, a1, a2, a3, G, W)
        lower, upper = _half(lanes, 0, BF16, PTX), _half(lanes, 1, BF16, PTX)
    else:
        lower, upper = _by_four(a0, a1, a2, a3, G, W), _by_four(b0, b1, b2, b3, G, W)
    weight = tl.join(lower, upper)
    if LEFT:
        weight = tl.permute(weight, [2, 3, 0, 4, 1, 5, 6])      # W, G, row, w low, lane, w high, half
        return tl.reshape(weight, [W, 8 * G, 32])
    else:
        weight = tl.permute(weight, [2, 5, 1, 4, 6, 3, 0])      # W, w high, lane, w low, half, G, row
        return tl.reshape(weight, [W, 32, 8 * G])


@triton.jit
def _eight(w0, w1, w2, w3, BF16: tl.constexpr, PTX: tl.constexpr):
    """Return the numbers of four words in three more dimensions: the word's low bit, its high bit, the half."""
    lanes = tl.join(tl.join(w0, w1), tl.join(w2, w3))
    return tl.join(_half(lanes, 0, BF16, PTX), _half(lanes, 1, BF16, PTX))


@triton.jit
def _activations(words, BLOCK_M: tl.constexpr, W: tl.constexpr, BF16: tl.constexpr, PTX: tl.constexpr):
    """Return the same columns of x, in the same order: [W, BLOCK_M or 16, 32]. Four words [4, 8, W, BLOCK_M / 8], or
    [4, 8, W]."""
    w0, w1, w2, w3 = words
    if BLOCK_M == 8:
        # The results of rows 8 to 15 are discarded, so their registers may hold anything: for the first instruction the
        # words that are there already, for the second nothing at all. That saves two moves in three.
        if PTX:
            anything = tl.inline_asm_elementwise("", "=r,r", [w0], dtype=tl.uint32, is_pure=True, pack=1)
        else:
            anything = w1
        low = tl.join(tl.join(w0, w1), tl.join(w2, w3))
        high = tl.join(tl.join(w1, anything), tl.join(w3, anything))
        lanes = tl.join(low, high)      # ..., w low, w high, row's high bit
        activation = tl.join(_half(lanes, 0, BF16, PTX), _half(lanes, 1, BF16, PTX))
        activation = tl.permute(activation, [2, 5, 1, 4, 0, 3, 6])
    else:
        activation = _eight(w0, w1, w2, w3, BF16, PTX)
        activation = tl.permute(activation, [2, 3, 1, 5, 0, 4, 6])      # W, rows of 8, row, w high, lane, w low, half
    return tl.reshape(activation, [W, BLOCK_M if BLOCK_M > 8 else 16, 32])


@triton.jit
def _right_activations(words, W: tl.constexpr, BF16: tl.constexpr, PTX: tl.constexpr):
    """Return the same columns of 8 rows of x as the right operand: [W, 32, 8]. Each instruction takes two neighbouring
    words, which lie as they were loaded."""
    w0, w1, w2, w3 = words
    activation = tl.permute(_eight(w0, w1, w2, w3, BF16, PTX), [2, 3, 0, 4, 5, 1])  # W, w low, lane, w high, half, row
    return tl.reshape(activation, [W, 32, 8])


@triton.jit
def _ordered_activations(words, BLOCK_M: tl.constexpr, W: tl.constexpr, BF16: tl.constexpr, PTX: tl.constexpr):
    """Return the same from x as `order_kernel` left it: words [4, 8, W, BLOCK_M / 16, 2]."""
    w0, w1, w2, w3 = words
    # W, block of 16, row's high bit, row, w high, lane, w low, half
    activation = tl.permute(_eight(w0, w1, w2, w3, BF16, PTX), [2, 3, 5, 1, 6, 0, 4, 7])
    return tl.reshape(activation, [W, BLOCK_M, 32])


@triton.jit
def _launch_dependents():
    """Let the next kernel begin once all programs have called this, if it was launched as a dependent. It still waits
    for this one to end.

    Call it after the wait for the kernels before, so that a kernel only ever overlaps with the one just before it:
    Inductor's kernels rely on that.
    """
    tl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False,
                              pack=1)


@triton.jit
def _wait_for_kernels_before():
    """Wait until the preceding kernels have ended, and return 0: added to an address, it keeps the load behind the
    wait."""
    return tl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False,
                                     pack=1)


@triton.jit(do_not_specialize=["M", "M_BLOCKS"])
def order_kernel(x, ordered, M, K, X_STRIDE, M_BLOCKS, DEPENDENT: tl.constexpr):
    """Reorder x [M, K] as the instruction's threads take it: ordered [K / 128, 4, M_BLOCKS, 2, 32 lanes, 8], zero past
    the ends. A program orders 16 rows by 128 columns. DEPENDENT: it may begin before the preceding kernels have ended,
    and lets the next one begin before it has ended.
    """
    if DEPENDENT:
        x += _wait_for_kernels_before()
        _launch_dependents()
    index = tl.arange(0, 2048)
    half, row_high, w_high, lane, w_low, j = (
        index & 1, (index >> 1) & 1, (index >> 2) & 1, (index >> 3) & 31, (index >> 8) & 1, index >> 9)
    k_tile, m_block = tl.program_id(0), tl.program_id(1)
    m = m_block * 16 + row_high * 8 + (lane >> 2)
    k = k_tile * 128 + j * 32 + (lane & 3) * 8 + w_high * 4 + w_low * 2 + half
    value = tl.load(x + m.to(tl.int64) * X_STRIDE + k, mask=(m < M) & (k < K), other=0.0)
    tl.store(ordered + ((k_tile * 4 + j) * M_BLOCKS + m_block) * 512 + (index & 511), value)


@triton.jit
def _load_single_pair(pointers):
    return tl.inline_asm_elementwise(
        "ld.global.v2.f32 {$0, $1}, [$2];", "=f,=f,l", [pointers.to(tl.int64)], dtype=(tl.float32, tl.float32),
        is_pure=True, pack=1)


@triton.jit
def _group_scales(scales, n_tile, group, GROUPS, ROWS: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
                  PTX: tl.constexpr):
    """Return fp32 scales of group [1, 1, W, 1] as the sums lie: [W, ROWS, 8 G]. n_tile [1, 1, W, G]."""
    inner = tl.arange(0, 4)[:, None, None, None] * 2 + tl.arange(0, 8)[None, :, None, None] * 0
    pointers = scales + ((n_tile * GROUPS + group) * 8 + inner)
    if PTX:
        even, odd = _load_single_pair(pointers)
    else:
        even, odd = tl.load(pointers), tl.load(pointers + 1)
    # from [4 lanes, 8 equal rows, W, G, 2]
    scale = tl.reshape(tl.permute(tl.join(even, odd), [2, 1, 3, 0, 4]), [W, 1, 8, 8 * G])
    return tl.reshape(tl.broadcast_to(scale, [W, ROWS // 8, 8, 8 * G]), [W, ROWS, 8 * G])


@triton.jit(do_not_specialize=["M", "K_TILES", "N_TILES", "ROW_SCALES", "GROUPS"])
def fragment_kernel(
    x, zeros, packed, scales, row_scale, out, M, N, K_TILES, N_TILES, X_STRIDE, ROW_SCALES, GROUPS,
    BITS: tl.constexpr, MOVES: tl.constexpr, FIRST: tl.constexpr, INT: tl.constexpr, FACTOR: tl.constexpr,
    SCALES: tl.constexpr, SCALE_MUL: tl.constexpr, SCALE_ADD: tl.constexpr, HALVES: tl.constexpr,
    BLOCK: tl.constexpr, BF16: tl.constexpr, PTX: tl.constexpr, BLOCK_M: tl.constexpr, G: tl.constexpr,
    WN: tl.constexpr, WK: tl.constexpr, DEPTH: tl.constexpr, ORDERED: tl.constexpr, TAIL: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Compute out [M, N]; a program makes BLOCK_M x 8 G WN of it. Of its num_warps = WN WK warps, each makes 8 G
    columns from every WK-th tile of K.

    x is [M, K] with rows of K = 128 K_TILES columns, X_STRIDE apart, on addresses of 16 bytes; with TAIL, K_TILES is no
    multiple of WK DEPTH, and past the end each lane reads `zeros`, 128 of them. Or, if ORDERED, the output of
    `order_kernel`, zero up to such a K, with X_STRIDE blocks of 16 rows. packed int32 [N_TILES, K_TILES, 32 BITS]:
    tiles of 8 rows by 128 columns. row_scale fp32 [N], or [1] with ROW_SCALES = 0. SCALES is ``none``; ``codes``: int32
    [N_TILES, K_TILES, 8, HALVES], a byte for each J, from which SCALE_MUL and SCALE_ADD make a 16-bit float that
    multiplies each weight; or ``fp32``: [N_TILES, GROUPS, 8], one for BLOCK columns. DEPTH tiles of the weight, and of
    up to 16 rows of x, are in flight while one is multiplied. OVERLAP (from sm_90 on): ``early`` and ``late`` as in
    `_tiles.OVERLAPS`; ``x``: it was launched before `order_kernel` ended, and waits for that before it reads x.
    """
    # The instruction's left operand has 16 rows, its right one 8: with 8 rows of x, the weight is the left one, so that
    # half as many instructions multiply. It needs two tiles of 8 rows.
    LEFT: tl.constexpr = BLOCK_M == 8 and G > 1 and SCALES != "fp32"
    ROWS: tl.constexpr = BLOCK_M if BLOCK_M > 8 else 16
    SCALED: tl.constexpr = SCALES == "codes"
    if OVERLAP == "early" or OVERLAP == "late":
        zero = _wait_for_kernels_before()
        x += zero
        packed += zero
        scales += zero
        row_scale += zero
    tl.assume(K_TILES > 0)
    W: tl.constexpr = WN * WK       # warp w: columns w // WK, tiles of K w % WK
    warp = tl.arange(0, W)[:, None]
    first_tile = (tl.program_id(0) * WN + warp // WK) * G + tl.arange(0, G)[None, :]
    first_tile = tl.minimum(first_tile, N_TILES - 1)    # [W, G]
    n_tile = first_tile[None, :, :] * K_TILES
    warp_k = (tl.arange(0, W) % WK)[None, :, None]

    lane, row = tl.arange(0, 4)[:, None, None, None], tl.arange(0, 8)[None, :, None, None]
    along_k = (tl.arange(0, W) % WK)[None, None, :, None]
    if ORDERED:     # [4 lanes, 8 rows, W, BLOCK_M / 16, 2]
        of_16 = (along_k * (X_STRIDE * 2048) + lane * 8 + row * 32
                 + tl.arange(0, BLOCK_M // 16)[None, None, None, :] * 512)[:, :, :, :, None]
        x_pointers = x + tl.program_id(1) * (BLOCK_M // 16 * 512) + (
            of_16 + tl.arange(0, 2)[None, None, None, None, :] * 256)
    else:           # [4 lanes, 8 rows, W, BLOCK_M / 8]
        m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M // 8)[None, None, None, :] * 8 + row
        x_pointers = x + tl.minimum(m, M - 1) * X_STRIDE + (along_k * 128 + lane * 8)

    if LEFT:
        sums = tl.full([W, 8 * G, 8], 0.0, tl.float32)
    else:
        sums = tl.full([W, ROWS, 8 * G], 0.0, tl.float32)
    nothing = sums
    last = n_tile + (K_TILES - 1)       # loaded again past the end
    following = n_tile + warp_k
    ahead = (_load_tiles(packed, scales, tl.minimum(following, last), BITS, SCALED, HALVES, PTX),)
    for _ in tl.static_range(1, DEPTH):
        following += WK
        ahead = ahead + (_load_tiles(packed, scales, tl.minimum(following, last), BITS, SCALED, HALVES, PTX),)
    if OVERLAP == "x":
        x_pointers += _wait_for_kernels_before()
    if OVERLAP == "early":
        _launch_dependents()
    n = (tl.program_id(0) * WN + tl.arange(0, WN)[:, None]) * (8 * G) + tl.arange(0, 8 * G)[None, :]
    if LEFT:
        n = n[:, :, None]
    else:
        n = n[:, None, :]
    of_rows = tl.load(row_scale + tl.minimum(n, N - 1) * ROW_SCALES)    # now: at the end nothing would hide its latency
    # Loads of x that the loop carries come with those of the weight; others come just before they are needed, and each
    # would wait for the L2 cache. More rows of x are too many registers.
    X_AHEAD: tl.constexpr = BLOCK_M <= 16
    step = X_STRIDE * 512 if ORDERED else 32
    of_tile = X_STRIDE * 2048 if ORDERED else 128
    if X_AHEAD:
        x_ahead = (_load_x_tile(x_pointers, zeros, 0, along_k, K_TILES, step, of_tile, BLOCK_M, W, ORDERED, TAIL, PTX),)
        for d in tl.static_range(1, DEPTH):
            x_ahead = x_ahead + (_load_x_tile(x_pointers, zeros, d * WK, along_k, K_TILES, step, of_tile, BLOCK_M, W,
                                              ORDERED, TAIL, PTX),)
    for first in range(0, K_TILES, WK * DEPTH):
        new = ()
        new_x = ()
        next_first = first + WK * DEPTH
        if not TAIL:
            next_first = tl.where(next_first < K_TILES, next_first, 0)      # read again past the end
        for d in tl.static_range(DEPTH):
            k_tile = first + d * WK
            words = ahead[d]
            following += WK
            new = new + (_load_tiles(packed, scales, tl.minimum(following, last), BITS, SCALED, HALVES, PTX),)
            factor = words[0] * 0 + FACTOR
            if SCALED:
                scale_codes = words[BITS]
            if X_AHEAD:
                of_x = x_ahead[d]
                new_x = new_x + (_load_x_tile(x_pointers, zeros, next_first + d * WK, along_k, K_TILES, step, of_tile,
                                              BLOCK_M, W, ORDERED, TAIL, PTX),)
            else:
                of_x = _load_x_tile(x_pointers, zeros, k_tile, along_k, K_TILES, step, of_tile, BLOCK_M, W, ORDERED,
                                    TAIL, PTX)
            if SCALES == "fp32":
                part = nothing
            for j in tl.static_range(4):
                if SCALED:
                    factor = _factor(scale_codes, j, SCALE_MUL, SCALE_ADD, PTX)
                if ORDERED:
                    activation = _ordered_activations(of_x[j], BLOCK_M, W, BF16, PTX)
                elif LEFT:
                    activation = _right_activations(of_x[j], W, BF16, PTX)
                else:
                    activation = _activations(of_x[j], BLOCK_M, W, BF16, PTX)
                weight = _weights(words, factor, j, MOVES, FIRST, INT, SCALED, BF16, PTX, G, W, LEFT)
                if LEFT:
                    sums = tl.dot(weight, activation, sums, input_precision="ieee")
                elif SCALES == "fp32":
                    part = tl.dot(activation, weight, part, input_precision="ieee")
                    if (32 * (j + 1)) % BLOCK == 0 or j == 3:
                        group = ((k_tile + tl.arange(0, W) % WK) * 128 + 32 * j)[None, None, :, None] // BLOCK
                        sums += part * _group_scales(scales, first_tile[None, None, :, :],
                                                     tl.minimum(group, GROUPS - 1), GROUPS, ROWS, G, W, PTX)
                        part = nothing
                else:
                    sums = tl.dot(activation, weight, sums, input_precision="ieee")
        ahead = new
        if X_AHEAD:
            x_ahead = new_x
    if OVERLAP == "late":
        _launch_dependents()

    m = tl.program_id(1) * BLOCK_M + tl.arange(0, 8 if LEFT else ROWS)
    if LEFT:
        m = m[None, None, :]
    else:
        m = m[None, :, None]
    if WK == 1:
        total = sums
    else:
        total = tl.reduce(tl.reshape(sums, [WN, WK, sums.shape[1], sums.shape[2]]), 1, tl.standard._sum_combine)
    total = total * of_rows
    mask = (n < N) & (m < M)
    if BLOCK_M == 8 and not LEFT:
        mask = mask & (tl.arange(0, ROWS) < 8)[None, :, None]
    tl.store(out + m.to(tl.int64) * N + n, total.to(out.dtype.element_ty), mask=mask)

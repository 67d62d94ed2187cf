# ruff: noqa: SIM108 (both branches of a conditional expression are compiled)
"""Two Triton kernels that multiply by packed weights: decode, product and scale in one launch each.

Both read planar rows (`fpxbench.numbers.packing`): the weights k = j * K_PAD / PLANES + i of all PLANES planes j come
out of the same few bytes, so a tile of bytes is multiplied by PLANES contiguous slices of the activation, and nothing
is shuffled. How the bits become numbers, and why that is exact, is in `_triton_codes`, where the constants are made.

Only Triton builtins and helpers of this file are called: the interpreter runs a second copy of this module, in
which `tl.sum` and its like, compiled functions of Triton's own, could not be called.
"""

import triton
import triton.language as tl


@triton.jit
def _moved(
    words, FIRST: tl.constexpr, PLANE: tl.constexpr, BYTE: tl.constexpr, MOVES: tl.constexpr, MOVE: tl.constexpr
):
    """Return one run of bits of plane PLANE, from bytes BYTE and BYTE + 2 of uint32 words to its place in both
    lanes."""
    WORD: tl.constexpr = FIRST + MOVES[MOVE][0] + PLANE % MOVES[MOVE][1]
    SOURCE: tl.constexpr = 8 * BYTE + (PLANE // MOVES[MOVE][1]) * MOVES[MOVE][2] + MOVES[MOVE][3]
    TARGET: tl.constexpr = MOVES[MOVE][5]
    MASK: tl.constexpr = (((1 << MOVES[MOVE][4]) - 1) << TARGET) * 0x10001
    if TARGET >= SOURCE:
        return (words[WORD] << (TARGET - SOURCE)) & MASK
    else:
        return (words[WORD] >> (SOURCE - TARGET)) & MASK


@triton.jit
def _lanes(
    words, FIRST: tl.constexpr, PLANE: tl.constexpr, BYTE: tl.constexpr, MOVES: tl.constexpr, FLIP: tl.constexpr
):
    """Return the codes of plane PLANE in bytes BYTE and BYTE + 2 of uint32 words, as the two lanes of one uint32.

    `words` is a tuple; those of the row in question begin at FIRST, in the order of the format's LOADS.
    """
    lanes = _moved(words, FIRST, PLANE, BYTE, MOVES, 0)
    for move in tl.static_range(1, len(MOVES)):
        lanes |= _moved(words, FIRST, PLANE, BYTE, MOVES, move)
    if FLIP:
        lanes ^= FLIP * 0x10001
    return lanes


@triton.jit
def _halves(lanes):
    """Return both fp16 lanes of each uint32 as fp32, in one conversion each (PTX; left to LLVM, they are shuffled
    first)."""
    return tl.inline_asm_elementwise(
        """
        {
            .reg .b16 low, high;
            mov.b32 {low, high}, $2;
            cvt.f32.f16 $0, low;
            cvt.f32.f16 $1, high;
        }
        """,
        "=f,=f,r", [lanes], dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
    )


@triton.jit
def _value(
    lanes, HALF: tl.constexpr, WIDEN: tl.constexpr, PTX: tl.constexpr,
    LANES: tl.constexpr, FLIP: tl.constexpr, SPECIALS: tl.constexpr, SPECIAL: tl.constexpr,
):
    """Return the raw number in lane HALF of uint32 `lanes`, with NaN and infinity in their codes' place.

    fp32 if WIDEN or if that is what the format's lanes give, else fp16.
    """
    if LANES == "bf16":
        if HALF:
            value = (lanes & 0xFFFF0000).to(tl.float32, bitcast=True)
        else:
            value = (lanes << 16).to(tl.float32, bitcast=True)
    elif WIDEN and PTX:
        value = _halves(lanes)[HALF]
    else:
        value = (lanes >> (16 * HALF)).to(tl.uint16).to(tl.float16, bitcast=True)
        if WIDEN:
            value = value.to(tl.float32)
    if LANES == "int":
        value = value - (FLIP - 0x6400 + 1024.0)
    if SPECIALS == "fnuz":      # what was moved as -0, which no other code gives
        if value.dtype == tl.float16:
            value = tl.where(value.to(tl.uint16, bitcast=True) == 0x8000, float("nan"), value)
        else:
            value = tl.where(value.to(tl.uint32, bitcast=True) == 0x80000000, float("nan"), value)
    elif SPECIALS == "fn":
        value = tl.where(tl.abs(value) == SPECIAL, float("nan"), value)
    elif SPECIALS == "ieee":
        value = tl.where(tl.abs(value) > SPECIAL, float("nan"), value)
        value = tl.where(value == SPECIAL, float("inf"), value)
        value = tl.where(value == -SPECIAL, float("-inf"), value)
    return value


@triton.jit
def _scale(pointers, mask, SCALES: tl.constexpr):
    """Return fp32 block scales: stored as such, as E8M0 codes (mx) or as E4M3FN codes (nv)."""
    if SCALES == "group":
        return tl.load(pointers, mask=mask, other=0.0)
    code = tl.load(pointers, mask=mask, other=0).to(tl.uint32)
    if SCALES == "mx":
        bits = tl.where(code == 0, 0x00400000, code << 23)    # code 0 is 2**-127, subnormal in fp32
        return tl.where(code == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    return _value(half, 0, True, False, "fp16", 0, "fn", 1.875) * 256.0    # 0x7F, NaN, would be 1.875 * 2**8


@triton.jit
def _row_scale(scales, tensor_scale, n, SCALES: tl.constexpr):
    """Return the remaining factor of a whole sum: the scale of row `n` (or of the tensor), or nv's second level."""
    if SCALES == "row":
        return tl.load(scales + n)
    elif SCALES == "tensor":
        return tl.load(scales + n * 0)
    elif SCALES == "nv":
        return tl.load(tensor_scale + n * 0)
    else:
        return n * 0 + 1.0


@triton.jit
def _sum(values, AXIS: tl.constexpr):
    return tl.reduce(values, AXIS, tl.standard._sum_combine)


@triton.jit
def _native_e4m3fn(words):
    """Return the four E4M3FN bytes of each uint32 as fp16 lanes: bytes 0 and 1, bytes 2 and 3 (PTX of sm_89 and
    later)."""
    return tl.inline_asm_elementwise(
        """
        {
            .reg .b16 low, high;
            mov.b32 {low, high}, $2;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
        }
        """,
        "=r,=r,r", [words], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1,
    )


@triton.jit
def _weight_of_byte(
    words, FIRST: tl.constexpr, PLANE: tl.constexpr, BYTE: tl.constexpr, NATIVE: tl.constexpr, PTX: tl.constexpr,
    MOVES: tl.constexpr, LANES: tl.constexpr, FLIP: tl.constexpr, SPECIALS: tl.constexpr, SPECIAL: tl.constexpr,
    WEIGHT_FACTOR: tl.constexpr,
):
    """Return fp32 weights of plane PLANE in byte BYTE of the words. The two bytes that share lanes share their
    decode."""
    if NATIVE:
        return _halves(_native_e4m3fn(words[FIRST])[BYTE // 2])[BYTE % 2]
    else:
        lanes = _lanes(words, FIRST, PLANE, BYTE % 2, MOVES, FLIP)
        value = _value(lanes, BYTE // 2, True, PTX, LANES, FLIP, SPECIALS, SPECIAL)
        if WEIGHT_FACTOR != 1.0:
            value = value * WEIGHT_FACTOR
        return value


@triton.jit
def matvec_kernel(
    x, packed, scales, tensor_scale, out, N,
    K_PAD: tl.constexpr, ROW_BYTES: tl.constexpr, PLANES: tl.constexpr, LOADS: tl.constexpr, MOVES: tl.constexpr,
    LANES: tl.constexpr, FLIP: tl.constexpr, SPECIALS: tl.constexpr, SPECIAL: tl.constexpr,
    WEIGHT_FACTOR: tl.constexpr, SUM_FACTOR: tl.constexpr, NATIVE: tl.constexpr, PTX: tl.constexpr,
    SCALES: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, SHARING: tl.constexpr,
    BF16: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):
    """Compute out [M, N] = x [M, K] @ weight.T for small M: ROWS rows of the weight per program, over all of K.

    Moves the packed weight once, 16 bytes per load and thread, and x through the cache. Everything is a vector of WORDS
    words, so no layout ever changes. On sm_90 a weight costs a multiply-add for each row of x, one conversion to fp32,
    and 0.5 (E4M3FN), 2 (FP4) or 2.6 (FP6) instructions of decode; in total, with M = 1 and ROWS = 4, 3.6, 4.6 and 5.1.

    x is int64 [M, K_PAD / 4], four activations each; packed is int32 [N, ROW_BYTES / 4]. BLOCK is 0 where a row has
    one scale. SHARING neighbouring words lie within one block: their products are added up before they are scaled.
    """
    STEPS: tl.constexpr = K_PAD // PLANES // 4      # words along one plane
    n0 = tl.program_id(0) * ROWS
    sums = ()
    for _ in tl.static_range(ROWS * M):
        sums = sums + (tl.full([WORDS // SHARING], 0.0, tl.float32),)

    for q0 in range(0, STEPS, WORDS):
        q = q0 + tl.arange(0, WORDS)
        shared_q = q0 + tl.arange(0, WORDS // SHARING) * SHARING
        words = ()
        for r in tl.static_range(ROWS):
            row = packed + tl.minimum(n0 + r, N - 1).to(tl.int64) * (ROW_BYTES // 4)
            for load in tl.static_range(len(LOADS)):
                word = tl.load(row + LOADS[load] // 4 + q, mask=q < STEPS, other=0)
                words = words + (word.to(tl.uint32, bitcast=True),)
        for plane in tl.static_range(PLANES):
            quads = ()
            for m in tl.static_range(M):
                quads = quads + (tl.load(x + (m * PLANES + plane) * STEPS + q, mask=q < STEPS, other=0),)
            new_sums = ()
            for r in tl.static_range(ROWS):
                row_scales = scales + tl.minimum(n0 + r, N - 1).to(tl.int64) * GROUPS
                products = ()
                for m in tl.static_range(M):
                    if BLOCK == 0:      # no block scales: add to the sum itself
                        products = products + (sums[r * M + m],)
                    else:
                        products = products + (tl.full([WORDS], 0.0, tl.float32),)
                for byte in tl.static_range(4):
                    weight = _weight_of_byte(
                        words, r * len(LOADS), plane, byte, NATIVE, PTX,
                        MOVES, LANES, FLIP, SPECIALS, SPECIAL, WEIGHT_FACTOR,
                    )
                    if BLOCK % 4:       # a word straddles blocks: every weight has its own scale
                        block = ((plane * STEPS + q) * 4 + byte) // BLOCK
                        scale = _scale(row_scales + block, (q < STEPS) & (block < GROUPS), SCALES)
                        weight = weight * SUM_FACTOR * scale
                    new_products = ()
                    for m in tl.static_range(M):
                        # Activation `byte` of the four in each int64. No function of its own: Triton's interpreter
                        # takes a millisecond for a call, and there are thousands here.
                        half = (quads[m] >> (16 * byte)).to(tl.uint16)
                        if BF16:
                            activation = (half.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
                        else:
                            activation = half.to(tl.float16, bitcast=True).to(tl.float32)
                        new_products = new_products + (products[m] + weight * activation,)
                    products = new_products
                if SHARING > 1:
                    added = ()
                    for m in tl.static_range(M):
                        added = added + (_sum(tl.reshape(products[m], [WORDS // SHARING, SHARING]), 1),)
                    products = added
                if BLOCK > 0 and BLOCK % 4 == 0:
                    block = (plane * STEPS + shared_q) * 4 // BLOCK
                    scale = _scale(row_scales + block, (shared_q < STEPS) & (block < GROUPS), SCALES)
                    scaled = ()
                    for m in tl.static_range(M):
                        scaled = scaled + (products[m] * SUM_FACTOR * scale,)
                    products = scaled
                for m in tl.static_range(M):
                    if BLOCK == 0:
                        new_sums = new_sums + (products[m],)
                    else:
                        new_sums = new_sums + (sums[r * M + m] + products[m],)
            sums = new_sums

    for r in tl.static_range(ROWS):
        n = n0 + r
        row_scale = _row_scale(scales, tensor_scale, tl.minimum(n, N - 1), SCALES)
        for m in tl.static_range(M):
            total = _sum(sums[r * M + m], 0)
            if BLOCK == 0:
                total = total * SUM_FACTOR
            tl.store(out + m * N + n, (total * row_scale).to(out.dtype.element_ty), mask=n < N)


@triton.jit
def dot_kernel(
    x, packed, scales, tensor_scale, out, M, N,
    K_PAD: tl.constexpr, ROW_BYTES: tl.constexpr, PLANES: tl.constexpr, LOADS: tl.constexpr, MOVES: tl.constexpr,
    LANES: tl.constexpr, FLIP: tl.constexpr, SPECIALS: tl.constexpr, SPECIAL: tl.constexpr,
    WEIGHT_FACTOR: tl.constexpr, SUM_FACTOR: tl.constexpr, NATIVE: tl.constexpr,
    SCALES: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, ALIGNED: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Compute out [M, N] = x [M, K] @ weight.T by matrix instructions: a tile [BLOCK_N, BLOCK_M] of the transpose per
    program.

    Moves the packed weight once for each BLOCK_M rows of x. The weight is the left operand, which matrix instructions
    take from registers, where it is decoded. Codes are exact in OPERAND, so the tile's products are too; block scales
    multiply the fp32 sums of a tile, and no weight is rounded anywhere.

    x is 16-bit [M, K_PAD], packed uint8 [N, ROW_BYTES]. BLOCK is 0 where a row has one scale. ALIGNED: no tile
    straddles blocks; otherwise a tile is multiplied once for each block that it touches, with the others masked.
    """
    STEPS: tl.constexpr = K_PAD // PLANES
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid_n = tl.minimum(n, N - 1)
    rows = packed + valid_n.to(tl.int64)[:, None] * ROW_BYTES
    columns = x + tl.minimum(m, M - 1).to(tl.int64)[None, :] * K_PAD
    row_scales = scales + valid_n.to(tl.int64) * GROUPS
    sums = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)

    for i0 in range(0, STEPS, BLOCK_K):
        i = i0 + tl.arange(0, BLOCK_K)
        bytes_ = ()
        for load in tl.static_range(len(LOADS)):
            pointers = rows + LOADS[load] + i[None, :]
            if STEPS % BLOCK_K:
                byte = tl.load(pointers, mask=(i < STEPS)[None, :], other=0)
            else:
                byte = tl.load(pointers)
            bytes_ = bytes_ + (byte,) if NATIVE else bytes_ + (byte.to(tl.uint32),)
        for plane in tl.static_range(PLANES):
            if NATIVE:
                weight = bytes_[0].to(tl.float8e4nv, bitcast=True).to(OPERAND)
            else:
                lanes = _lanes(bytes_, 0, plane, 0, MOVES, FLIP)
                weight = _value(lanes, 0, False, False, LANES, FLIP, SPECIALS, SPECIAL)
                if WEIGHT_FACTOR != 1.0:
                    weight = weight.to(tl.float32) * WEIGHT_FACTOR
                weight = weight.to(OPERAND)
            pointers = columns + (plane * STEPS + i)[:, None]
            if STEPS % BLOCK_K:
                activation = tl.load(pointers, mask=(i < STEPS)[:, None], other=0.0).to(OPERAND)
            else:
                activation = tl.load(pointers).to(OPERAND)
            if BLOCK == 0:
                sums = tl.dot(weight, activation, sums, input_precision=PRECISION)
            elif ALIGNED:
                block = (plane * STEPS + i0) // BLOCK
                scale = _scale(row_scales + block, (n < N) & (block < GROUPS), SCALES)
                products = tl.dot(weight, activation, input_precision=PRECISION)
                sums += products * SUM_FACTOR * scale[:, None]
            else:
                blocks = (plane * STEPS + i) // BLOCK
                last = (plane * STEPS + tl.minimum(i0 + BLOCK_K, STEPS) - 1) // BLOCK
                for touched in range(0, (BLOCK_K - 2) // BLOCK + 2):
                    block = (plane * STEPS + i0) // BLOCK + touched
                    scale = _scale(row_scales + block, (n < N) & (block <= last) & (block < GROUPS), SCALES)
                    members = tl.where((blocks == block)[None, :], weight, 0.0).to(OPERAND)
                    products = tl.dot(members, activation, input_precision=PRECISION)
                    sums += products * SUM_FACTOR * scale[:, None]

    if BLOCK == 0:
        sums = sums * SUM_FACTOR
    sums = sums * _row_scale(scales, tensor_scale, valid_n, SCALES)[:, None]
    pointers = out + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(pointers, sums.to(out.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])

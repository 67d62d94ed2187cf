"""Small Triton kernels, one for each operation.

They use only what every Triton from 3.0 on has, and no more control flow than the operation needs: the question is
whether they compile, and to what.
"""

import triton
import triton.language as tl


@triton.jit
def convert(source, out, BLOCK: tl.constexpr):
    """out = source, in out's dtype."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(source + at).to(out.dtype.element_ty))


@triton.jit
def encode(source, out, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    """out = source, in out's fp8, rounded by ROUNDING."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(source + at).to(out.dtype.element_ty, fp_downcast_rounding=ROUNDING))


@triton.jit
def quantize_store(
    source, scale, out, transposed, ynumel, xnumel, YBLOCK: tl.constexpr, XBLOCK: tl.constexpr, HIGH: tl.constexpr,
    TRANS: tl.constexpr,
):
    """out [Y, X] = source [Y, X] * scale [Y, 1] clamped to ±HIGH, in out's fp8; the same values to transposed [X, Y].

    Tiled, masked and clamped (NaN stays NaN) as Inductor writes a pointwise kernel. TRANS: the second store is of a
    transposed tile; else the same tile goes to transposed addresses, as Inductor does it.
    """
    y = tl.program_id(1) * YBLOCK + tl.arange(0, YBLOCK)
    x = tl.program_id(0) * XBLOCK + tl.arange(0, XBLOCK)
    yindex, xindex = y[:, None], x[None, :]
    mask = (yindex < ynumel) & (xindex < xnumel)
    number = tl.load(source + (xindex + xnumel * yindex), mask, other=0.0).to(tl.float32)
    number = number * tl.load(scale + yindex, yindex < ynumel, other=0.0)
    number = tl.maximum(number, -HIGH, propagate_nan=tl.PropagateNan.ALL)
    number = tl.minimum(number, HIGH, propagate_nan=tl.PropagateNan.ALL)
    quantized = number.to(out.dtype.element_ty)
    tl.store(out + (xindex + xnumel * yindex), quantized, mask)
    if TRANS:
        tl.store(transposed + (y[None, :] + ynumel * x[:, None]), tl.trans(quantized),
                 (x[:, None] < xnumel) & (y[None, :] < ynumel))
    else:
        tl.store(transposed + (yindex + ynumel * xindex), quantized, mask)


@triton.jit
def decode_by_integers(
    source, out, BLOCK: tl.constexpr, BITS: tl.constexpr, MANTISSA_SHIFT: tl.constexpr, HALF: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """out = the float of BITS bits in each byte of source: its bits moved to a float's, times a power of two.

    Through fp16 if HALF, else through bf16 widened to fp32.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(source + at).to(tl.uint16)
    sign = (code >> (BITS - 1)) << 15
    magnitude = (code & ((1 << (BITS - 1)) - 1)) << MANTISSA_SHIFT
    if HALF:
        value = (sign | magnitude).to(tl.uint16).to(tl.float16, bitcast=True) * FACTOR
    else:
        value = ((sign | magnitude).to(tl.uint32) << 16).to(tl.float32, bitcast=True) * FACTOR
    tl.store(out + at, value.to(out.dtype.element_ty))


@triton.jit
def dequantized_dot(
    x, weight, scale, out, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_FIRST: tl.constexpr, BITS: tl.constexpr,
    MANTISSA_SHIFT: tl.constexpr,
):
    """out [M, N] = x [M, K] @ (weight * scale), the weight upcast to x's dtype between its load and the product.

    K_FIRST: the weight is stored [N, K], with K contiguous; else [K, N]. BITS 0: the weight has one of Triton's fp8
    types; else its bytes are floats of so many bits, which integer operations move to x's bits, the power of two being
    part of the scale.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    N = tl.num_programs(1) * BLOCK_N
    a_pointers = x + m[:, None] * K + k[None, :]
    if K_FIRST:  # noqa: SIM108  (Triton 3.0 has no conditional expression of pointers)
        b_pointers = weight + n[None, :] * K + k[:, None]
    else:
        b_pointers = weight + k[:, None] * N + n[None, :]
    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for _ in range(0, K, BLOCK_K):
        a = tl.load(a_pointers)
        b = tl.load(b_pointers)
        if BITS == 0:
            b = b.to(a.dtype)
        else:
            code = b.to(tl.uint16)
            bits = ((code >> (BITS - 1)) << 15) | ((code & ((1 << (BITS - 1)) - 1)) << MANTISSA_SHIFT)
            b = bits.to(tl.uint16).to(a.dtype, bitcast=True)     # up to 3.1 a shift by a constant widens
        sums += tl.dot(a, b)
        a_pointers += BLOCK_K
        if K_FIRST:
            b_pointers += BLOCK_K
        else:
            b_pointers += BLOCK_K * N
    sums = sums * tl.load(scale + n)[None, :]
    tl.store(out + m[:, None] * N + n[None, :], sums.to(out.dtype.element_ty))


@triton.jit
def fp8_dot(a, b, out, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """out [M, N] = a [M, K] @ b [K, N], both fp8, with no upcast of ours."""
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    left = tl.load(a + m[:, None] * BLOCK_K + k[None, :])
    right = tl.load(b + n[None, :] * BLOCK_K + k[:, None])
    tl.store(out + m[:, None] * BLOCK_N + n[None, :], tl.dot(left, right))


@triton.jit
def scaled_dot(
    a, a_scale, b, b_scale, out, A: tl.constexpr, B: tl.constexpr, A_PACKED: tl.constexpr, B_PACKED: tl.constexpr,
    A_SCALED: tl.constexpr, B_SCALED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """out [M, N] = (a [M, K] * a_scale [M, K / 32]) @ (b [K, N] * b_scale [N, K / 32]): OCP MX, E8M0 scales.

    Two e2m1 codes of neighbouring k share a byte. 16-bit operands have no scale.
    """
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    ka, kb, g = tl.arange(0, BLOCK_K // A_PACKED), tl.arange(0, BLOCK_K // B_PACKED), tl.arange(0, BLOCK_K // 32)
    left = tl.load(a + m[:, None] * (BLOCK_K // A_PACKED) + ka[None, :])
    right = tl.load(b + n[None, :] * (BLOCK_K // B_PACKED) + kb[:, None])
    left_scale = None
    right_scale = None
    if A_SCALED:
        left_scale = tl.load(a_scale + m[:, None] * (BLOCK_K // 32) + g[None, :])
    if B_SCALED:
        right_scale = tl.load(b_scale + n[:, None] * (BLOCK_K // 32) + g[None, :])
    product = tl.dot_scaled(left, left_scale, A, right, right_scale, B)
    tl.store(out + m[:, None] * BLOCK_N + n[None, :], product)

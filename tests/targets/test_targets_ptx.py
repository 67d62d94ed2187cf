"""The interpreter of PTX computes what NVIDIA's manual says, and says so where it does not know."""

import math
import struct

import pytest
from ptx_samples import DECODE, ENCODE

from fpxbench.numbers.formats import FORMATS, FP16
from fpxbench.records.kinds import Kind
from fpxbench.targets.encode_check import encode_fault
from fpxbench.targets.floats import nearest
from fpxbench.targets.ptx_execution import decoded_table, run as run_kernel
from fpxbench.targets.ptx_instructions import GLOBAL, Memory
from fpxbench.targets.ptx_parser import Unmodelled, parse


def run(body, source=0, size=4):
    """Return what a kernel stores that loads 32 bits into %r1, does `body`, and stores %r2 (and %r3 if `size` is 8)."""
    stored = "{ %r2, %r3 }" if size == 8 else "%r2"
    kernel = parse(f"""
.visible .entry kernel(
.param .u64 source,
.param .u64 out
)
{{
.reg .b32 %r<9>;
ld.param.u64 %rd1, [source];
ld.param.u64 %rd2, [out];
ld.global.b32 {{ %r1 }}, [ %rd1 + 0 ];
{body}
st.global{'.v2' if size == 8 else ''}.b32 [ %rd2 + 0 ], {stored};
ret;
}}
""")
    memory = Memory()
    memory.write(GLOBAL, source, 4)
    run_kernel(kernel, (GLOBAL, 2 * GLOBAL), memory, 1)
    return memory.read(2 * GLOBAL, size)


def float_bits(value):
    return struct.unpack("<I", struct.pack("<f", value))[0]


# Instructions.


def test_bytes_are_permuted_by_their_selector_and_its_high_bit_spreads_the_sign():
    assert run("prmt.b32 %r2, %r1, 0xAABBCCDD, 0x7160;", 0x11228344) == 0xAA83BB44
    assert run("prmt.b32 %r2, %r1, 0, 0x4449;", 0x11228344) == 0x000000FF       # nibble 9: the sign of byte 1, 0x83


@pytest.mark.parametrize("table", [0xC0, 0xF8, 0xE2, 0x96])
def test_three_input_logic_follows_its_table_bit_by_bit(table):
    a, b, c = 0x12345678, 0xF0F0A5A5, 0x0FF000FF
    expected = 0
    for place in range(32):
        index = (a >> place & 1) * 4 + (b >> place & 1) * 2 + (c >> place & 1)
        expected |= (table >> index & 1) << place
    assert run(f"lop3.b32 %r2, %r1, {b:#x}, {c:#x}, {table:#x};", a) == expected


@pytest.mark.parametrize(("body", "source", "expected"), [
    ("shl.b32 %r2, %r1, 40;", 1, 0),                                    # past the width: nothing is left
    ("shr.s32 %r2, %r1, 4;", 0x80000000, 0xF8000000),
    ("shr.u32 %r2, %r1, 4;", 0x80000000, 0x08000000),
    ("bfe.u32 %r2, %r1, 8, 4;", 0x00000F00, 0xF),
    ("mad.lo.s32 %r2, %r1, -3, 7;", 5, 0xFFFFFFF8),
    ("cvt.u16.u32 %rs1, %r1; cvt.u32.u16 %r2, %rs1;", 0x12345678, 0x5678),
    ("cvt.s32.s8 %r2, %r1;", 0x80, 0xFFFFFF80),
    ("mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r2, {%rs2, %rs1};", 0x12345678, 0x56781234),
    ("mov.b32 {_, %rs2}, %r1; mov.b32 %r2, {%rs2, %rs2};", 0x12345678, 0x12341234),
    ("setp.lt.s32 %p1, %r1, 0; selp.b32 %r2, 1, 2, %p1;", 0xFFFFFFFF, 1),
    ("setp.lt.u32 %p1, %r1, 5; selp.b32 %r2, 1, 2, %p1;", 0xFFFFFFFF, 2),
    ("mov.u32 %r2, 7; setp.eq.s32 %p1, %r1, 0; @%p1 mov.u32 %r2, 8;", 0, 8),
    ("mov.u32 %r2, 7; setp.eq.s32 %p1, %r1, 0; @!%p1 mov.u32 %r2, 8;", 0, 7),
])
def test_integers_are_computed_as_the_manual_says(body, source, expected):
    assert run(body, source) == expected


@pytest.mark.parametrize(("body", "source", "expected"), [
    ("mul.f32 %r2, %r1, 0f40000000;", float_bits(2.0**-140), float_bits(2.0**-139)),     # subnormals are kept
    ("mul.ftz.f32 %r2, %r1, 0f40000000;", float_bits(2.0**-140), 0),                     # unless flushed
    ("add.f32 %r2, %r1, 0f33800000;", float_bits(1.0), float_bits(1.0)),                 # 1 + 2**-24: a tie, to even
    # rounded once
    ("fma.rn.f32 %r2, %r1, %r1, 0fBF800000;", float_bits(1 + 2.0**-23), float_bits(2.0**-22 + 2.0**-46)),
    ("neg.f32 %r2, %r1;", 0, 0x80000000),
    ("max.f32 %r2, %r1, 0f3F800000;", 0x7FC00000, float_bits(1.0)),                      # a NaN gives way
    ("mul.f16x2 %r2, %r1, 0x3C004000;", 0x40003C00, 0x40004000),                         # lanes (1, 2) * (2, 1)
    ("mul.rn.bf16x2 %r2, %r1, 0x3F804000;", 0x40003F80, 0x40004000),
    # the second source is the low lane
    ("cvt.rn.bf16x2.f32 %r2, 0f3F800000, %r1;", float_bits(1.00390625), 0x3F803F80),
    ("cvt.rz.f16.f32 %rs1, %r1; cvt.u32.u16 %r2, %rs1;", float_bits(1.9999), 0x3FFF),
    ("cvt.rz.f16.f32 %rs1, %r1; cvt.u32.u16 %r2, %rs1;", float_bits(1e6), 0x7BFF),       # towards zero: not to infinity
    ("set.nan.f16x2.f16x2 %r2, %r1, %r1;", 0x7E003C00, 0x3C000000),
    # -900 saturates; a tie to even
    ("cvt.rn.satfinite.e4m3x2.f32 %rs1, 0fC4610000, %r1; cvt.u32.u16 %r2, %rs1;", float_bits(1.0625), 0xFE38),
    ("cvt.rn.satfinite.e5m2x2.f16x2 %rs1, %r1; cvt.u32.u16 %r2, %rs1;", 0x80003D80, 0x803E),
    ("cvt.rn.f16x2.e4m3x2 %r2, %r1;", 0x7E01, nearest(FP16, 448.0) << 16 | nearest(FP16, 2.0**-9)),
    ("cvt.rn.f16x2.e5m2x2 %r2, %r1;", 0x7C01, nearest(FP16, math.inf) << 16 | nearest(FP16, 2.0**-16)),
])
def test_floats_are_computed_as_the_manual_says(body, source, expected):
    assert run(body, source) == expected


def test_a_thread_has_its_own_local_array():
    body = (".local .align 4 .b8 __local_depot0[8]; mov.u64 %rd5, __local_depot0; "
            "st.v2.u8 [%rd5+2], {%r1, 9}; ld.u16 %r2, [%rd5+2];")
    assert run(body, 0x55) == 0x0955


@pytest.mark.parametrize("instruction", [
    "bra $L__BB0_2;", "bar.sync 1;", "shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;", "div.full.f32 %r2, %r1, %r1;",
    "cvt.rp.bf16.f32 %rs1, %r1; mov.b32 %r2, {%rs1, %rs1};",
    "cvt.rn.satfinite.relu.e4m3x2.f32 %rs1, %r1, %r1; mov.b32 %r2, {%rs1, %rs1};",
    "mul.hi.u32 %r2, %r1, 3;", "mul.rz.f32 %r2, %r1, %r1;", "prmt.b32.f4e %r2, %r1, 0, 1;", "mov.b32 %r2, %unwritten;",
    "add.s32 %r2, %r1;",
])
def test_an_unmodelled_instruction_is_an_error(instruction):
    with pytest.raises(Unmodelled, match=instruction.split()[0].split(".")[0]):
        run(instruction, 5)


def test_a_scope_that_hides_an_outer_register_is_not_modelled():
    assert run("{ .reg .b32 inner; mov.b32 inner, %r1; mov.b32 %r2, inner; }", 5) == 5
    with pytest.raises(Unmodelled, match="hides"):
        run("mov.b32 %r2, %r1; { .reg .b32 %r<9>; mov.b32 %r2, 7; }", 5)


def test_a_rounding_that_an_instruction_leaves_open_is_not_guessed():
    body = "cvt.u16.u32 %rs1, %r1; cvt.bf16.f16 %rs2, %rs1; mov.b32 %r2, {%rs2, %rs2};"
    assert run(body, nearest(FP16, 1.5)) == 0x3FC03FC0
    with pytest.raises(Unmodelled, match="does not say how"):
        run(body, nearest(FP16, 1 + 2.0**-10))


# Decodes.


def same(table, fmt):
    right = [fmt.value(code) for code in range(256)]
    return all(a == b and math.copysign(1, a) == math.copysign(1, b) or math.isnan(a) and math.isnan(b) for a,
               b in zip(table, right, strict=True))


@pytest.mark.parametrize(("instruction", "fmt"), [("e4m3x2", "e4m3fn"), ("e5m2x2", "e5m2")])
def test_every_code_is_run_through_every_thread(instruction, fmt):
    assert same(decoded_table(DECODE.format(instruction=instruction, correction=""), FP16, 4), FORMATS[fmt])


def test_a_decode_that_is_wrong_in_one_lane_is_wrong():
    table = decoded_table(DECODE.format(instruction="e4m3x2", correction="and.b32 %r3, %r3, 0xFFFF7FFF;"), FP16, 4)
    assert not same(table, FORMATS["e4m3fn"])
    assert [code for code in range(256) if math.copysign(1, table[code]) > 0 and code >= 128
            and code != 255] == list(range(130, 255, 4))


def test_a_decode_that_leaves_numbers_out_is_unknown():
    with pytest.raises(Unmodelled, match="where nothing is"):
        decoded_table(DECODE.format(instruction="e4m3x2", correction="").replace("shl.b32 	%r5, %r4, 7;",
                                                                                 "mov.u32 %r5, 0;"), FP16, 4)


# Encodes.


DIRECT = "cvt.rn.satfinite.e4m3x2.f32 %rs1, 0f00000000, %r1;"


@pytest.mark.parametrize(("body", "rounding", "kind", "cause"), [
    (DIRECT, "rtne", None, ""),
    (DIRECT, "rtz", Kind.INACCURATE, "rounds to nearest even, and was asked to round towards zero"),
    ("cvt.rz.f16.f32 %rs2, %r1; mov.b32 %r3, {%rs2, %rs2}; cvt.rn.satfinite.e4m3x2.f16x2 %rs1, %r3;", "rtne",
     Kind.DOUBLE_ROUNDING, "rounds towards zero to fp16 first"),
    ("and.b32 %r1, %r1, 0xFFF00000;" + DIRECT, "rtne", Kind.INACCURATE, "another code"),
    ("setp.eq.s32 %p1, %r1, 0x3B000000; @%p1 mov.u32 %r1, 0;" + DIRECT, "rtne", Kind.SUBNORMAL_WRONG, "subnormal"),
], ids=["right", "not-as-asked", "by-way-of-fp16", "cut", "one-subnormal"])
def test_an_encode_fault_is_recognised_by_the_numbers_on_which_roundings_differ(body, rounding, kind, cause):
    found = encode_fault(ENCODE.format(body=body), "e4m3fn", "fp32", rounding, 1)
    if kind is None:
        assert found is None
    else:
        assert found[0] is kind and cause in found[1]
        assert "instead of" in found[2]

"""PTX of small kernels, as Triton writes it, with places left open for what a test plants."""

DECODE = """
.visible .entry convert(
.param .u64 .ptr .global .align 1 convert_param_0,
.param .u64 .ptr .global .align 1 convert_param_1
)
{{
ld.param.b64 	%rd3, [convert_param_0];
ld.param.b64 	%rd4, [convert_param_1];
mov.u32 	%r4, %ctaid.x;
shl.b32 	%r5, %r4, 7;
mov.u32 	%r6, %tid.x;
shl.b32 	%r7, %r6, 2;
or.b32 	%r9, %r7, %r5;
cvt.s64.s32 	%rd5, %r9;
mad.wide.s32 	%rd2, %r9, 2, %rd4;
add.s64 	%rd1, %rd3, %rd5;
ld.global.b32 {{ %r1 }}, [ %rd1 + 0 ];
cvt.u16.u32 %rs1, %r1;
mov.b32 {{_, %rs2}}, %r1;
cvt.rn.f16x2.{instruction} %r2, %rs1;
cvt.rn.f16x2.{instruction} %r3, %rs2;
{correction}
st.global.v2.b32 [ %rd2 + 0 ], {{ %r2, %r3 }};
ret;
}}
"""
"""Four bytes a thread to fp16: ``instruction`` e4m3x2 or e5m2x2; ``correction`` of the lanes in %r2 and %r3."""

ENCODE = """
.visible .entry encode(
.param .u64 encode_param_0,
.param .u64 encode_param_1
)
{{
ld.param.u64 	%rd3, [encode_param_0];
ld.param.u64 	%rd4, [encode_param_1];
mov.u32 	%r4, %ctaid.x;
shl.b32 	%r5, %r4, 5;
mov.u32 	%r6, %tid.x;
or.b32 	%r9, %r6, %r5;
cvt.s64.s32 	%rd5, %r9;
mad.wide.s32 	%rd2, %r9, 4, %rd3;
add.s64 	%rd1, %rd4, %rd5;
ld.global.b32 {{ %r1 }}, [ %rd2 + 0 ];
{body}
cvt.u32.u16 %r2, %rs1;
st.global.b8 [ %rd1 + 0 ], %r2;
ret;
}}
"""
"""One fp32 number a thread, in %r1, to the byte in %rs1, by `body`."""

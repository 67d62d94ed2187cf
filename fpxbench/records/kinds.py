"""The kinds of mistake: one table for the code, the pages and the docs.

A new kind needs an entry here, code that emits it, and an example of the fault among the tests.
``tests/records/test_kinds.py`` fails for a kind that nothing emits, or that a stage emits without being listed.
``python tools/kinds_table.py`` writes the table into docs/verdicts.md.
"""

from __future__ import annotations

from enum import Flag, StrEnum, auto


class Stage(Flag):
    """A part of fpxbench that names mistakes."""

    PRODUCT = auto()     # diagnosis of a wrong product, by one-hot activations
    STORED = auto()      # diagnosis of the codes and scales that `quantize` stored
    CASTS = auto()       # conversions of a framework, input by input
    TARGETS = auto()     # kernels compiled for an architecture, and executed where possible
    COMPILER = auto()    # messages of compilers and frameworks
    CONTRACT = auto()    # how a call behaves, whatever its numbers


class Group(StrEnum):
    """The subject of a mistake: the sections of the docs' table, in order."""

    CODES = "what a code stands for"
    ROUNDING = "how values become codes"
    LAYOUT = "where a code is stored"
    SCALES = "which scale a code is multiplied by"
    ACTIVATIONS = "what happens to the activation"
    EXPERTS = "which expert a token is multiplied by"
    RESULT = "how far the result is off"
    CALL = "how a call behaves, whatever its numbers"
    COMPILER = "what the compiler or the framework refuses or fails at"


class Kind(StrEnum):
    """Which mistake: a closed list.

    An entry gives its name in records, its group, the stages that may emit it (none: it is only in old records), a
    predicate that follows an implementation's name in a sentence, and what is seen.
    """

    group: Group
    emitted_by: Stage
    predicate: str
    seen: str

    # With defaults, because type checkers treat `Kind("scaled")` as a call of this.
    def __new__(cls, name: str, group: Group = Group.RESULT, emitted_by: Stage = Stage(0), predicate: str = "",     # noqa: B008
                seen: str = "") -> Kind:
        kind = str.__new__(cls, name)
        kind._value_ = name
        kind.group, kind.emitted_by, kind.predicate, kind.seen = group, emitted_by, predicate, seen
        return kind

    # ---- what a code stands for

    FNUZ_AS_FN = ("fnuz_as_fn", Group.CODES, Stage.PRODUCT | Stage.STORED | Stage.CASTS | Stage.TARGETS,
                  "takes FNUZ codes for FN codes, off by a factor of 2",
                  "Every normal value is off by a factor of 2 (bias 8 against 7), and 0x80 is -0 where FNUZ has its "
                  "NaN.")
    FN_AS_FNUZ = ("fn_as_fnuz", Group.CODES, Stage.PRODUCT | Stage.STORED | Stage.CASTS | Stage.TARGETS,
                  "takes FN codes for FNUZ codes, off by a factor of 2",
                  "Every normal value is off by a factor of 2 (bias 7 against 8), and 0x80 is NaN where FN has -0.")
    NAN_CODE_LOST = ("nan_code_lost", Group.CODES, Stage.CONTRACT | Stage.PRODUCT | Stage.CASTS | Stage.TARGETS,
                     "turns NaN into a number",
                     "A NaN code reads as a number, infinity as a finite one; or a cast of NaN gives a number.")
    NEGATIVE_ZERO = ("negative_zero", Group.CODES, Stage.PRODUCT | Stage.STORED | Stage.CASTS,
                     "gets negative zero wrong",
                     "-0 reads as NaN, a tiny negative value is stored as 0x80, which FNUZ reads as NaN, or a cast "
                     "gives a zero of the wrong sign.")
    SIGN_LOST = ("sign_lost", Group.CODES, Stage.CONTRACT | Stage.PRODUCT | Stage.STORED,
                 "loses the sign",
                 "Negative weights are read, or stored, as positive.")
    SUBNORMAL_FLUSHED = ("subnormal_flushed", Group.CODES, Stage.CONTRACT | Stage.PRODUCT | Stage.STORED | Stage.CASTS,
                         "flushes subnormals to zero",
                         "The smallest codes read as 0, or what rounds to them is stored as 0. SQNR does not move: "
                         "only tests of single codes show it.")
    SUBNORMAL_WRONG = ("subnormal_wrong", Group.CODES, Stage.PRODUCT | Stage.STORED | Stage.CASTS | Stage.TARGETS,
                       "gets subnormals wrong",
                       "The smallest codes read as other values, or what rounds to them gets another code. SQNR does "
                       "not move: only tests of single codes show it.")

    FORMAT_MISTAKEN = ("format_mistaken", Group.CODES, Stage.PRODUCT,
                       "reads codes as another format's",
                       "Codes are decoded with another format's table or bit layout, which is named: E2M3 for E3M2, "
                       "INT4 for E2M1, two's complement for sign and magnitude, bits in reverse order.")

    # ---- how values become codes

    DOUBLE_ROUNDING = ("double_rounding", Group.ROUNDING, Stage.STORED | Stage.CASTS | Stage.TARGETS,
                       "rounds twice",
                       "Codes are as if values, or their scale, were rounded to a narrower type first (fp32 → bf16 → "
                       "fp8).")
    TIES_AWAY = ("ties_away", Group.ROUNDING, Stage.CONTRACT | Stage.STORED | Stage.CASTS | Stage.TARGETS,
                 "rounds ties away from zero",
                 "Halfway values go to the larger neighbour, not to the even one.")
    TRUNCATED = (
        "truncated", Group.ROUNDING, Stage.CONTRACT | Stage.PRODUCT | Stage.STORED | Stage.CASTS | Stage.TARGETS,
        "truncates",
        "Values are rounded toward zero or down, or low mantissa bits of a code are not read.",
    )
    TIES_NOT_EVEN = ("ties_not_even", Group.ROUNDING, Stage.PRODUCT | Stage.STORED,
                     "rounds ties to zero, up or down",
                     "Halfway values go to the smaller neighbour, up or down, not to the even one.")
    ROUNDING_BIASED = ("rounding_biased", Group.ROUNDING, Stage.STORED,
                       "rounds at random, with a bias",
                       "Values go to either neighbour at random, but not in proportion to their place between the two.")
    OVERFLOW_NAN = ("overflow_nan", Group.ROUNDING, Stage.CONTRACT | Stage.PRODUCT | Stage.STORED | Stage.CASTS,
                    "overflows to NaN",
                    "Values beyond the largest become NaN, though the scheme or the dtype requires otherwise.")
    OVERFLOW_INF = ("overflow_inf", Group.ROUNDING, Stage.PRODUCT | Stage.STORED | Stage.CASTS,
                    "overflows to infinity",
                    "Values beyond the largest become infinity, though the scheme or the dtype requires otherwise.")
    SATURATED = ("saturated", Group.ROUNDING, Stage.CONTRACT | Stage.PRODUCT | Stage.STORED | Stage.CASTS,
                 "saturates",
                 "Values are clamped to a maximum, though the scheme or the dtype requires otherwise.")

    # ---- where a code is stored

    NIBBLE_SWAP = ("nibble_swap", Group.LAYOUT, Stage.PRODUCT | Stage.CASTS,
                   "swaps nibbles",
                   "The halves of a byte are exchanged: neighbouring 4-bit codes, or the halves of an 8-bit code.")
    PLANE_SWAP = ("plane_swap", Group.LAYOUT, Stage.PRODUCT,
                  "swaps planes",
                  "Codes, or parts of their bits, are taken from another plane of the packed bytes.")

    WEIGHT_TRANSPOSED = ("weight_transposed", Group.LAYOUT, Stage.PRODUCT,
                         "transposes the weight",
                         "The weight at row n, column k is the one stored at row k, column n; only a square weight "
                         "hides it.")
    CODE_PERMUTED = ("code_permuted", Group.LAYOUT, Stage.PRODUCT,
                     "reads codes from other places",
                     "Whole codes are read from other positions, in an order that no known layout has; the order is "
                     "given.")

    OUTPUT_PERMUTED = ("output_permuted", Group.LAYOUT, Stage.PRODUCT,
                       "gives output features in another order",
                       "Rows of the weight come out in another order, their scales with them: the halves of a fused "
                       "layer exchanged.")

    # ---- which scale a code is multiplied by

    SCALE_MISSING = ("scale_missing", Group.SCALES, Stage.CONTRACT | Stage.PRODUCT | Stage.STORED,
                     "leaves a scale out",
                     "A scale, or one of two levels, is not applied, or every stored scale is 1.")
    SCALE_TRANSPOSED = ("scale_transposed", Group.SCALES, Stage.CONTRACT | Stage.PRODUCT | Stage.STORED,
                        "applies scales along the wrong axis",
                        "Scales of rows act on columns, or the matrix of scales is read or stored column by column.")
    SCALED = ("scaled", Group.SCALES, Stage.PRODUCT | Stage.STORED | Stage.TARGETS,
              "is off by one factor",
              "Every weight is off by the same factor, but NaN and -0 are right: a product or a scale off by that "
              "factor, an E8M0 exponent read one off, a bias read one off without its special codes.")
    WRONG_MAX = ("wrong_max", Group.SCALES, Stage.PRODUCT | Stage.STORED,
                 "scales by the wrong maximum",
                 "Scales are made from another format's maximum (448, 240, 224); in MX from another emax, so that "
                 "every exponent is one off.")
    BLOCK_OFF_BY_ONE = ("block_off_by_one", Group.SCALES, Stage.CONTRACT | Stage.PRODUCT | Stage.STORED,
                        "takes the neighbouring block's scale",
                        "Each block is multiplied by the scale of its neighbour (a row, of the next row), or blocks "
                        "begin one column off.")

    SCALE_SQUARED = ("scale_squared", Group.SCALES, Stage.CONTRACT | Stage.PRODUCT,
                     "applies the scale twice",
                     "Each weight is multiplied by the square of its block scale.")
    SCALE_INVERTED = ("scale_inverted", Group.SCALES, Stage.CONTRACT | Stage.PRODUCT | Stage.STORED,
                      "divides by the scale",
                      "Each weight is divided by its block scale.")
    SCALE_BITS_AS_VALUE = ("scale_bits_as_value", Group.SCALES, Stage.PRODUCT,
                           "takes the bits of a scale for its value",
                           "Weights are multiplied by a stored scale's code, or its exponent field, as an integer.")
    SCALE_NARROWED = ("scale_narrowed", Group.SCALES, Stage.PRODUCT,
                      "passes scales through a narrower type",
                      "Scales are right within a range, and 0, infinite or clamped outside it, as when they pass "
                      "through fp16.")
    SCALE_ENDS_LOST = ("scale_ends_lost", Group.SCALES, Stage.CONTRACT | Stage.PRODUCT,
                       "misreads the first or last scale codes",
                       "Zero, subnormal or NaN codes of the scale format read as another number: E8M0's 0 as zero, 255"
                       " as infinity.")
    SCALE_MISREAD = ("scale_misread", Group.SCALES, Stage.PRODUCT,
                     "reads scale codes as other numbers",
                     "Each scale code is decoded to one wrong number: another format's, one without mantissa, or an "
                     "unknown one.")
    GLOBAL_SCALE_MISSING = ("global_scale_missing", Group.SCALES, Stage.CONTRACT | Stage.PRODUCT,
                            "leaves the second-level scale out",
                            "The scale of the whole tensor is not applied.")
    GLOBAL_SCALE_INVERTED = ("global_scale_inverted", Group.SCALES, Stage.CONTRACT | Stage.PRODUCT,
                             "inverts the second-level scale",
                             "Weights are divided by the scale of the whole tensor, or its reciprocal is stored and "
                             "not divided by.")
    GLOBAL_SCALE_MISREAD = ("global_scale_misread", Group.SCALES, Stage.CONTRACT | Stage.PRODUCT,
                            "applies another second-level scale",
                            "Weights are multiplied by the square or the root of the whole tensor's scale, or by a "
                            "constant.")
    SCALE_SWIZZLED = ("scale_swizzled", Group.SCALES, Stage.PRODUCT,
                      "reads scales in the tiled order of tensor cores",
                      "Block scales stored row by row are read in the order of 128 x 4 tiles, or the reverse.")
    SCALE_SHARED = ("scale_shared", Group.SCALES, Stage.CONTRACT | Stage.PRODUCT,
                    "gives several blocks one scale",
                    "Neighbouring blocks or rows are all multiplied by the scale of one of them.")
    SCALE_PERMUTED = ("scale_permuted", Group.SCALES, Stage.PRODUCT,
                      "reads scales from other blocks",
                      "Each block is multiplied by the scale of another one, by the stated rule, or by no known rule.")
    BLOCK_SIZE_MISTAKEN = ("block_size_mistaken", Group.SCALES, Stage.PRODUCT,
                           "takes blocks for longer or shorter ones",
                           "Scales change along K after another number of weights than the scheme's block.")
    SCALE_PADDING_READ = ("scale_padding_read", Group.SCALES, Stage.PRODUCT,
                          "multiplies by numbers that are not scales",
                          "Some blocks are multiplied by a factor that no stored scale has: padding of the scale "
                          "tensor, or memory beside it.")
    SCALE_ONE_STEP_HIGH = ("scale_one_step_high", Group.SCALES, Stage.STORED,
                           "stores E8M0 scales one step too high",
                           "Every stored exponent is one above the rule's, also where no rounding rule asks for it.")
    SCALE_ONE_STEP_LOW = ("scale_one_step_low", Group.SCALES, Stage.STORED,
                          "stores E8M0 scales one step too low",
                          "Every stored exponent is one below the rule's.")
    SCALE_ROUNDED_LATE = ("scale_rounded_late", Group.SCALES, Stage.STORED,
                          "divides by scales before it rounds them",
                          "Codes are made under a scale that is rounded to its stored format only afterwards, and read"
                          " under that.")
    ZERO_BLOCK = ("zero_block", Group.SCALES, Stage.CONTRACT | Stage.STORED,
                  "fails on blocks of zeros",
                  "A row or block of zeros is stored with a scale or codes that are not finite: 0 / 0.")

    # ---- what happens to the activation

    STALE_ACTIVATION_SCALE = ("stale_activation_scale", Group.ACTIVATIONS, Stage.CONTRACT,
                              "scales activations by an earlier one's scale",
                              "The activation is quantized under the scale of the first call, or of the one that was "
                              "captured.")

    ACTIVATION_QUANTIZED = ("activation_quantized", Group.ACTIVATIONS, Stage.CONTRACT,
                            "quantizes activations without saying so",
                            "The activation is rounded to a few bits, which neither the scheme nor the implementation "
                            "declares.")

    NONFINITE_SPREADS = ("nonfinite_spreads", Group.ACTIVATIONS, Stage.CONTRACT,
                         "lets NaN of one token reach others",
                         "NaN or infinity in one row of the activation changes other rows of the output.")

    # ---- which expert a token is multiplied by

    EXPERT_MISTAKEN = ("expert_mistaken", Group.EXPERTS, Stage.PRODUCT,
                       "multiplies tokens by another expert's weight",
                       "All rows of an expert are multiplied by another expert's weight, or single rows by other "
                       "weights without a known rule.")
    EXPERT_BOUNDARY = ("expert_boundary", Group.EXPERTS, Stage.PRODUCT,
                       "takes the rows of an expert from the wrong place",
                       "Rows at the boundary of two experts are multiplied by the neighbour's weight: offsets are read "
                       "some rows off.")
    EMPTY_EXPERT = ("empty_expert", Group.EXPERTS, Stage.PRODUCT | Stage.CONTRACT,
                    "fails where an expert has no tokens",
                    "Rows are multiplied by wrong weights, are garbage, or the call fails, if some expert has no rows, "
                    "and are right if all do.")

    # ---- how far the result is off

    GIBBERISH = ("gibberish", Group.RESULT, Stage.PRODUCT | Stage.STORED | Stage.CASTS | Stage.TARGETS,
                 "gives gibberish",
                 "Finite, uncorrelated with the exact result, and no known mistake fits.")
    INACCURATE = (
        "inaccurate", Group.RESULT, Stage.PRODUCT | Stage.STORED | Stage.CASTS | Stage.TARGETS | Stage.CONTRACT,
        "is inaccurate",
        "Near the exact result, but outside the bound, or in parts only; no known mistake fits.",
    )

    # ---- how a call behaves, whatever its numbers

    WRONG_SHAPE = ("wrong_shape", Group.CALL, Stage.STORED | Stage.CONTRACT,
                   "gives a tensor of the wrong shape",
                   "The output is not [M, N], the weight read back not [N, K], or the scales not of the scheme's "
                   "shape.")
    WRONG_DTYPE = ("wrong_dtype", Group.CALL, Stage.CONTRACT,
                   "gives an output of the wrong dtype",
                   "The output is not in the activation's dtype.")
    UNWRITTEN_OUTPUT = ("unwritten_output", Group.CALL, Stage.CONTRACT,
                        "leaves output elements unwritten",
                        "Memory is filled with a pattern before the call, and still holds it afterwards.")
    STALE_OUTPUT = ("stale_output", Group.CALL, Stage.CONTRACT,
                    "gives the output of the previous call",
                    "Inputs are fresh at every call, and the output answers the previous ones.")
    INPUT_MODIFIED = ("input_modified", Group.CALL, Stage.CONTRACT,
                      "changes its inputs in place",
                      "The activation or the stored weight differs after the call.")
    NOT_REPEATABLE = ("not_repeatable", Group.CALL, Stage.PRODUCT | Stage.CONTRACT,
                      "is not repeatable",
                      "The same operands give a right result in one call and a wrong one in another.")
    CONFIG_DEPENDENT = ("config_dependent", Group.CALL, Stage.CONTRACT,
                        "is wrong with some autotuning configurations",
                        "Every configuration that the autotuner may pick is checked, and some are wrong.")

    M_DEPENDENT = ("m_dependent", Group.CALL, Stage.CONTRACT | Stage.PRODUCT,
                   "is wrong for some token counts",
                   "The same weight is multiplied by other numbers of tokens (M), and some products are wrong.")
    SHAPE_DEPENDENT = ("shape_dependent", Group.CALL, Stage.CONTRACT,
                       "is wrong for some shapes",
                       "Weights of other N and K (odd, shorter than a block, 32 more than a multiple of 256) are "
                       "multiplied in one process, and some products are wrong.")
    ACTIVATION_LAYOUT = ("activation_layout", Group.CALL, Stage.CONTRACT,
                         "is wrong for batched or strided activations",
                         "Right for a contiguous [M, K]; wrong for [B, M, K], a slice, a transpose, or an offset that "
                         "is not aligned.")
    WEIGHT_DEPENDENT = ("weight_dependent", Group.CALL, Stage.CONTRACT,
                        "is wrong once there are several weights",
                        "One process multiplies by several weights, and a product is wrong that was right when there "
                        "was one.")
    BIAS_WRONG = ("bias_wrong", Group.CALL, Stage.CONTRACT,
                  "gets the bias wrong",
                  "Right without a bias, wrong with one.")
    STREAM_UNSAFE = ("stream_unsafe", Group.CALL, Stage.CONTRACT,
                     "is wrong on two CUDA streams at once",
                     "Two calls run at once on two streams, and a product is wrong that is right alone.")
    READS_EARLY = ("reads_early", Group.CALL, Stage.CONTRACT,
                   "reads its activation before it is written",
                   "Its kernels are launched before the one before has ended (programmatic dependent launch), and read "
                   "what that one writes without waiting for it.")
    READS_UNWRITTEN = ("reads_unwritten", Group.CALL, Stage.CONTRACT,
                       "reads memory that was never written",
                       "Right where new memory holds zeros, wrong where it holds NaN or large numbers; padding is "
                       "multiplied, for example.")
    OUTPUT_CHANGED = ("output_changed", Group.CALL, Stage.CONTRACT,
                      "returns an output that changes afterwards",
                      "The output is computed on another stream or thread that nothing waits for, or its memory is "
                      "used again.")
    LAZY_OUTPUT = ("lazy_output", Group.CALL, Stage.CONTRACT,
                   "returns something that is computed when it is read",
                   "The output is not a plain tensor but a subclass, whose work a clock does not see.")
    FROZEN_INPUT = ("frozen_input", Group.CALL, Stage.CONTRACT | Stage.PRODUCT,
                    "answers for an earlier activation in the same buffer",
                    "The timed calls, or the captured graph, are run again with another activation in the same memory,"
                    " and give the product of the first.")
    RESULT_REMEMBERED = ("result_remembered", Group.CALL, Stage.CONTRACT | Stage.PRODUCT,
                         "remembers results",
                         "An activation that was seen before takes a fraction of the time of a new one.")
    HIDDEN_WORK = ("hidden_work", Group.CALL, Stage.CONTRACT,
                   "works where the clock does not see it",
                   "The device works on after the timed stream has ended.")
    ENVIRONMENT_PATCHED = ("environment_patched", Group.CALL, Stage.CONTRACT,
                           "replaces functions of torch or the clock",
                           "Functions that every other implementation is measured with are not the original ones after"
                           " a call.")

    # ---- what the compiler or the framework refuses or fails at

    UNSUPPORTED_ROUNDING = ("unsupported_rounding", Group.COMPILER, Stage.COMPILER,
                            "needs a rounding mode that the compiler refuses",
                            "The compiler's message says so.")
    UNSUPPORTED_CONVERSION = ("unsupported_conversion", Group.COMPILER, Stage.COMPILER,
                              "needs a conversion that the compiler refuses",
                              "The compiler's message says so.")
    UNSUPPORTED_DTYPE = ("unsupported_dtype", Group.COMPILER, Stage.COMPILER,
                         "needs a dtype that is not supported",
                         "The compiler's or PyTorch's message says so.")
    UNSUPPORTED_ARCH = ("unsupported_arch", Group.COMPILER, Stage.COMPILER,
                        "needs another architecture",
                        "The compiler's or PyTorch's message says so.")
    ASSEMBLER_ERROR = ("assembler_error", Group.COMPILER, Stage.TARGETS | Stage.COMPILER,
                       "fails in the assembler",
                       "ptxas or the AMD assembler rejects the generated code.")
    COMPILER_ABORT = ("compiler_abort", Group.COMPILER, Stage.COMPILER,
                      "aborts inside the compiler",
                      "LLVM or MLIR aborts the process.")
    PASS_FAILED = ("pass_failed", Group.COMPILER, Stage.COMPILER,
                   "fails in a compiler pass",
                   "A pass over the intermediate code reports a failure.")
    EMPTY_OBJECT = ("empty_object", Group.COMPILER, Stage.TARGETS,
                    "compiles to an empty object",
                    "The compiler reports success and leaves nothing to run.")


def sibling_kind(specials: str) -> Kind:
    """Return the kind of mistaking codes of a format with these `Format.specials` for its sibling's."""
    return Kind.FNUZ_AS_FN if specials == "fnuz" else Kind.FN_AS_FNUZ


def describe_stages(stages: Stage) -> str:
    """Return the docs' names of `stages`: ``product, stored, casts``."""
    return ", ".join((stage.name or "").lower() for stage in stages)

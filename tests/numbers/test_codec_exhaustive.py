"""Every 16-bit number, and on request every fp32, against two independent libraries."""

import gfloat
import numpy as np
import pytest
import torch
from codec_by_search import discriminating_numbers
from codec_libraries import (
    GFLOAT_MODES,
    ML_OVERFLOW,
    NO_CODE,
    gfloat_codes,
    gfloat_info,
    listed_differences,
    ml_dtypes_codes,
    numbers_of_kind,
)
from test_formats import BY_PARTS, PUBLISHED

from fpxbench.numbers.formats import format_named
from fpxbench.numbers.tensor_codec import Overflow, Rounding, decode_table, encode

pytestmark = pytest.mark.usefixtures("one_thread")

GFLOAT_FORMATS = (*PUBLISHED, *BY_PARTS, "e4m3ieee", "e4m3b11fnuz", "e3m2fn", "e8m0", "int8", "int4")
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
DIFFERENCES = listed_differences()


def every_number(dtype, fmt):
    """Return all 65,536 numbers, without NaN where the format has none and refuses it."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    return numbers if fmt.has_nan else numbers[~numbers.isnan()]


def differing(ours, theirs, fmt):
    """Return where codes differ; any NaN is as good as another."""
    ours, theirs = np.asarray(ours).astype(np.int16), np.asarray(theirs).astype(np.int16)
    nan = np.append(np.isnan(decode_table(fmt).numpy()), False)     # the last for NO_CODE
    assert NO_CODE == -1
    return (ours != theirs) & ~(nan[ours] & nan[theirs])


def expected_to_differ(library, x, fmt, rounding):
    listed = [
        numbers_of_kind(row.kind, x, fmt, rounding)
        for row in DIFFERENCES
        if (row.library, row.fmt.name) == (library, fmt.name)
    ]
    return np.any(listed, axis=0) if listed else np.zeros(len(x), bool)


def assert_differs_as_listed(ours, theirs, x, fmt, listed):
    wrong = np.flatnonzero(differing(ours, theirs, fmt) != listed)
    assert not len(wrong), [
        f"{float(x[i]).hex()}: {ours[i]:#x} here, {theirs[i]:#x} there; {'listed' if listed[i] else 'not listed'}"
        for i in wrong[:5]
    ]


@pytest.mark.parametrize("row", DIFFERENCES, ids=lambda row: f"{row.library}-{row.fmt.name}-{row.kind}")
def test_every_difference_in_the_docs_table_exists(row):
    x = np.array([row.number], dtype=row.source)
    theirs = (
        ml_dtypes_codes(x, row.fmt)
        if row.library == "ml_dtypes"
        else gfloat_codes(x.astype(np.float64), row.fmt, row.rounding)
    )
    assert theirs.tolist() == [row.theirs]
    assert encode(torch.from_numpy(x), row.fmt, row.rounding).tolist() == [row.here]


@pytest.mark.parametrize("source", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("name", GFLOAT_FORMATS)
def test_all_65536_numbers_encode_as_gfloat_encodes_them_except_as_listed(name, source):
    fmt = format_named(name)
    numbers = every_number(source, fmt)
    x = numbers.double().numpy()
    other = Overflow.INFINITY if fmt.has_infinity else Overflow.NAN
    for rounding in GFLOAT_MODES:
        listed = expected_to_differ("gfloat", x, fmt, rounding)
        for overflow in (Overflow.SATURATE, other) if fmt.has_nan else (Overflow.SATURATE,):
            theirs = gfloat_codes(x, fmt, rounding, saturates=overflow is Overflow.SATURATE)
            assert_differs_as_listed(encode(numbers, fmt, rounding, overflow).numpy(), theirs, x, fmt, listed)


@pytest.mark.parametrize("source", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("name", GFLOAT_FORMATS)
def test_all_65536_numbers_round_to_odd_by_the_exact_ones_and_the_odd_neighbour(name, source):
    """No library rounds to odd; gfloat's roundings toward zero and away from it are the two neighbours."""
    fmt = format_named(name)
    numbers = every_number(source, fmt)
    x = numbers.double()
    inside = (x.abs() <= fmt.max) & ((x >= fmt.min_normal) | fmt.has_zero)
    numbers, x = numbers[inside], x[inside].numpy()
    inward = gfloat_codes(x, fmt, Rounding.TOWARD_ZERO)
    outward = np.where(x > 0, gfloat_codes(x, fmt, Rounding.UP), gfloat_codes(x, fmt, Rounding.DOWN))
    assert_differs_as_listed(encode(numbers, fmt, Rounding.TO_ODD).numpy(),
                             np.where((inward == outward) | (inward % 2 == 1), inward, outward), x, fmt,
                             np.zeros(len(x), bool))


@pytest.mark.parametrize("source", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("name", ML_OVERFLOW)
def test_all_65536_numbers_encode_as_ml_dtypes_encodes_them_except_as_listed(name, source):
    fmt = format_named(name)
    numbers = every_number(source, fmt)
    x = numbers.double().numpy()
    theirs = ml_dtypes_codes(numbers.float().numpy(), fmt)
    assert_differs_as_listed(
        encode(numbers, fmt).numpy(), theirs, x, fmt, expected_to_differ("ml_dtypes", x, fmt, Rounding.NEAREST_EVEN)
    )


@pytest.mark.parametrize("source", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("name", [name for name in ML_OVERFLOW if name != "e8m0"])
def test_with_the_overflow_of_ml_dtypes_every_code_is_the_same(name, source):
    fmt = format_named(name)
    numbers = every_number(source, fmt)
    theirs = ml_dtypes_codes(numbers.float().numpy(), fmt)
    ours = encode(numbers, fmt, overflow=ML_OVERFLOW[name]).numpy()
    assert_differs_as_listed(ours, theirs, numbers.double().numpy(), fmt, np.zeros(len(ours), bool))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", [*PUBLISHED, *BY_PARTS])
def test_every_tie_and_its_neighbours_round_as_gfloat_rounds_them(name, dtype):
    fmt = format_named(name)
    numbers = discriminating_numbers(fmt, dtype)
    # see the docs on fp64's subnormals
    numbers = numbers[(np.abs(numbers) > 1e-300) | (numbers == 0) | (np.isnan(numbers) & fmt.has_nan)]
    x = numbers.astype(np.float64)
    for rounding in GFLOAT_MODES:
        ours = encode(torch.from_numpy(numbers), fmt, rounding).numpy()
        assert_differs_as_listed(ours, gfloat_codes(x, fmt, rounding), x, fmt, np.zeros(len(x), bool))


def test_gfloat_loses_what_is_subnormal_in_fp64_and_this_codec_does_not():
    fmt, tiny = format_named("e3m2b-2"), np.array([5e-324])
    assert gfloat.round_ndarray(gfloat_info(fmt), tiny, GFLOAT_MODES[Rounding.UP]).tolist() == [0.0]
    assert encode(torch.from_numpy(tiny), fmt, Rounding.UP).tolist() == [1]


def test_ml_dtypes_rounds_fp64_twice_and_this_codec_once():
    # a hair above the tie of 1 and 1.125, which is what fp32 makes of it
    fmt, x = format_named("e4m3fn"), np.array([1.0625 + 2.0**-40])
    assert fmt.value(int(ml_dtypes_codes(x, fmt)[0])) == 1.0
    assert fmt.value(encode(torch.from_numpy(x), fmt).item()) == 1.125


@pytest.mark.slow       # half a minute each on an idle core
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz"])
def test_all_4294967296_fp32_numbers_encode_as_ml_dtypes_encodes_them(name):
    fmt, chunk, compared = format_named(name), 1 << 20, 0
    first = torch.arange(chunk, dtype=torch.int32)
    for start in range(-(1 << 31), 1 << 31, chunk):
        numbers = (first + start).view(torch.float32)
        ours = encode(numbers, fmt, overflow=ML_OVERFLOW[name]).numpy()
        theirs = ml_dtypes_codes(numbers.numpy(), fmt)
        if not np.array_equal(ours, theirs):        # a negative NaN, or an error
            assert_differs_as_listed(ours, theirs, numbers.numpy(), fmt, np.zeros(chunk, bool))
        compared += chunk
    assert compared == 1 << 32

// Decode, product and scale of planar rows in one pass over the packed weight, for one format and one kind of scales.
//
// Memory traffic: each packed byte once, each scale once. Cost, for a vector of 16 numbers (8 with AVX2), decode and
// one token: FP8 5 instructions, FP6 6, FP4 5 to 8. _cpu_build.py compiles this file with the constants of a scheme:
//
//   BITS, EXPONENT, MANTISSA, BIAS   of a code; EXPONENT 0 and not INTEGER: decoded by the table alone
//   SPECIALS                   0 none, 1 ieee, 2 fn, 3 fnuz: what the top codes mean
//   INTEGER                    1: two's complement
//   BF16_EXACT                 1: bf16 has every number
//   BLOCK                      weights along K that share a scale; 0: one scale per row, or one for all
//   CODED                      1: scales are uint8 codes, looked up in a table
//
// Without AVX2 every code is looked up, one at a time.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t COLUMNS = BLOCK ? BLOCK : 1;

struct Piece { int offset, width; };

// A code is cut into pieces of 8, 4, 2 or 1 bits, low bits first.
constexpr Piece piece(int number) {
    int offset = 0, found = 0;
    for (int width = 8; width; width /= 2)
        if (BITS - offset >= width) {
            if (found++ == number) return {offset, width};
            offset += width;
        }
    return {BITS, 0};
}
constexpr int count_pieces() { int n = 0; while (piece(n).width) ++n; return n; }
constexpr int PIECES = count_pieces();
constexpr int PLANES = 8 / piece(PIECES - 1).width;

// Where plane `plane` of a piece begins, in planes, and which bits of a byte it is.
constexpr int slices(int number) { return PLANES * piece(number).width / 8; }
constexpr int first(int number) { int at = 0; for (int i = 0; i < number; ++i) at += slices(i); return at; }

struct Weight {
    const uint8_t *packed;       // [N, row_bytes]
    const float *table;          // [256]: the number of each code
    const void *scales;          // fp32 or, CODED, uint8: [rows / scale_rows, blocks]
    const float *scale_table;    // [256], CODED only
    int64_t k, plane, row_bytes; // plane: codes of a row in each plane
    int64_t blocks, scale_rows;  // scale_rows: rows of the weight that share a row of scales

    // Where a row's scales begin, and the scale of a block from there.
    int64_t scales_of(int64_t row) const { return row / scale_rows * blocks; }
    float scale(int64_t begin, int64_t block) const {
        const int64_t at = begin + block;
        return CODED ? scale_table[static_cast<const uint8_t *>(scales)[at]] : static_cast<const float *>(scales)[at];
    }
};

inline int code_at(const uint8_t *row, int plane, int64_t i, int64_t size) {
    int code = 0;
    for (int p = 0; p < PIECES; ++p) {
        const int byte = row[(first(p) + plane % slices(p)) * size + i];
        code |= ((byte >> (plane / slices(p) * piece(p).width)) & ((1 << piece(p).width) - 1)) << piece(p).offset;
    }
    return code;
}

// The number of code `i` of a plane of a row, under its block's scale.
inline float number_at(const Weight &w, const uint8_t *row, int64_t begin, int plane, int64_t i) {
    const float number = w.table[code_at(row, plane, i, w.plane)];
    return BLOCK ? number * w.scale(begin, (plane * w.plane + i) / COLUMNS) : number;
}

#if defined(__AVX512F__)
constexpr int LANES = 16;
typedef __m512 Floats;
typedef __m256i Bytes;
typedef __m512i Halves;
inline Bytes load(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
inline Bytes bits_of(Bytes b, int shift, int mask) { return _mm256_and_si256(_mm256_srli_epi16(b, shift), _mm256_set1_epi8(mask)); }
inline Bytes moved(Bytes b, int shift) { return _mm256_slli_epi16(b, shift); }
inline Bytes joined(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
inline Halves widened(Bytes b) { return _mm512_cvtepu8_epi16(b); }
inline Halves left(Halves h, int n) { return _mm512_slli_epi16(h, n); }
inline Halves right(Halves h, int n) { return _mm512_srai_epi16(h, n); }
inline Halves both(Halves a, Halves b) { return _mm512_and_si512(a, b); }
inline Halves either(Halves a, Halves b) { return _mm512_or_si512(a, b); }
inline Halves less(Halves a, Halves b) { return _mm512_sub_epi16(a, b); }
inline Halves larger(Halves a, Halves b) { return _mm512_max_epi16(a, b); }
inline Halves all(int n) { return _mm512_set1_epi16((short)n); }
inline Halves or_where_equal(Halves h, Halves a, Halves b, Halves bits) {
    return _mm512_or_si512(h, _mm512_maskz_mov_epi16(_mm512_cmpeq_epi16_mask(a, b), bits));
}
inline Halves or_where_above(Halves h, Halves a, Halves b, Halves bits) {
    return _mm512_or_si512(h, _mm512_maskz_mov_epi16(_mm512_cmpgt_epi16_mask(a, b), bits));
}
inline Floats from_fp16(Halves h, int half) {
    return _mm512_cvtph_ps(half ? _mm512_extracti64x4_epi64(h, 1) : _mm512_castsi512_si256(h));
}
inline Floats from_int16(Halves h, int half) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(half ? _mm512_extracti64x4_epi64(h, 1) : _mm512_castsi512_si256(h)));
}
inline __m512i indices(Bytes b, int half) {
    return _mm512_cvtepu8_epi32(half ? _mm256_extracti128_si256(b, 1) : _mm256_castsi256_si128(b));
}
inline Floats gathered(Bytes b, int half, const float *table) { return _mm512_i32gather_ps(indices(b, half), table, 4); }
inline Floats looked_up(Bytes b, int half, const float *table) {
    const __m512i index = indices(b, half);
    if (BITS <= 4) return _mm512_permutexvar_ps(index, _mm512_loadu_ps(table));
    const Floats low = _mm512_permutex2var_ps(_mm512_loadu_ps(table), index, _mm512_loadu_ps(table + 16));
    if (BITS == 5) return low;
    const Floats high = _mm512_permutex2var_ps(_mm512_loadu_ps(table + 32), index, _mm512_loadu_ps(table + 48));
    return _mm512_mask_mov_ps(low, _mm512_test_epi32_mask(index, _mm512_set1_epi32(32)), high);
}
inline Floats read(const float *p) { return _mm512_loadu_ps(p); }
inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats same(float f) { return _mm512_set1_ps(f); }
inline Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats added(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Floats v) { return _mm512_reduce_add_ps(v); }
inline void write(float *p, Floats v) { _mm512_storeu_ps(p, v); }
inline void write_fp16(uint16_t *p, Floats v) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, 0)); }
#if defined(__AVX512BF16__)
inline void write_bf16(uint16_t *p, Floats v) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(v)); }
#else
inline void write_bf16(uint16_t *p, Floats v) {
    const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
#endif
typedef __m512i Words;
inline Words load_words(const uint8_t *p) { return _mm512_loadu_si512(p); }
inline Words left_word(Words w, int n) { return _mm512_slli_epi32(w, n); }
inline Words right_word(Words w, int n) { return _mm512_srai_epi32(w, n); }
inline Words both_words(Words a, uint32_t mask) { return _mm512_and_si512(a, _mm512_set1_epi32((int)mask)); }
inline Words largest_byte(Words a, Words b) { return _mm512_max_epu8(a, b); }
inline Words no_words() { return _mm512_setzero_si512(); }
inline bool any_byte_from(Words w, int n) { return _mm512_cmpge_epu8_mask(w, _mm512_set1_epi8((char)n)) != 0; }
inline Words where_byte(Words w, int n) { return _mm512_movm_epi8(_mm512_cmpeq_epi8_mask(w, _mm512_set1_epi8((char)n))); }
inline Floats as_floats(Words w) { return _mm512_castsi512_ps(w); }
inline Words sixteen_bytes(const uint8_t *p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p)); }
inline Words bytes_at(Words sixteen, Words index) { return _mm512_shuffle_epi8(sixteen, index); }
inline Words added_bytes(Words a, Words b) { return _mm512_add_epi8(a, b); }
inline Words paired_low(Words a, Words b) { return _mm512_unpacklo_epi8(a, b); }
inline Words paired_high(Words a, Words b) { return _mm512_unpackhi_epi8(a, b); }
template <int FIRST> inline Floats from_lane(Floats v, float f) {
    return _mm512_mask_mov_ps(v, (__mmask16)(0xFFFF << FIRST), _mm512_set1_ps(f));
}
#elif defined(__AVX2__)
constexpr int LANES = 8;
typedef __m256 Floats;
typedef __m128i Bytes;
typedef __m256i Halves;
inline Bytes load(const uint8_t *p) { return _mm_loadu_si128((const __m128i *)p); }
inline Bytes bits_of(Bytes b, int shift, int mask) { return _mm_and_si128(_mm_srli_epi16(b, shift), _mm_set1_epi8(mask)); }
inline Bytes moved(Bytes b, int shift) { return _mm_slli_epi16(b, shift); }
inline Bytes joined(Bytes a, Bytes b) { return _mm_or_si128(a, b); }
inline Halves widened(Bytes b) { return _mm256_cvtepu8_epi16(b); }
inline Halves left(Halves h, int n) { return _mm256_slli_epi16(h, n); }
inline Halves right(Halves h, int n) { return _mm256_srai_epi16(h, n); }
inline Halves both(Halves a, Halves b) { return _mm256_and_si256(a, b); }
inline Halves either(Halves a, Halves b) { return _mm256_or_si256(a, b); }
inline Halves less(Halves a, Halves b) { return _mm256_sub_epi16(a, b); }
inline Halves larger(Halves a, Halves b) { return _mm256_max_epi16(a, b); }
inline Halves all(int n) { return _mm256_set1_epi16((short)n); }
inline Halves or_where_equal(Halves h, Halves a, Halves b, Halves bits) {
    return _mm256_or_si256(h, _mm256_and_si256(_mm256_cmpeq_epi16(a, b), bits));
}
inline Halves or_where_above(Halves h, Halves a, Halves b, Halves bits) {
    return _mm256_or_si256(h, _mm256_and_si256(_mm256_cmpgt_epi16(a, b), bits));
}
inline Floats from_fp16(Halves h, int half) {
    return _mm256_cvtph_ps(half ? _mm256_extracti128_si256(h, 1) : _mm256_castsi256_si128(h));
}
inline Floats from_int16(Halves h, int half) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(half ? _mm256_extracti128_si256(h, 1) : _mm256_castsi256_si128(h)));
}
inline __m256i indices(Bytes b, int half) { return _mm256_cvtepu8_epi32(half ? _mm_srli_si128(b, 8) : b); }
inline Floats gathered(Bytes b, int half, const float *table) { return _mm256_i32gather_ps(table, indices(b, half), 4); }
// A table of 16 is two look-ups in eight numbers; the fourth bit chooses one.
inline Floats looked_up(Bytes b, int half, const float *table) {
    const __m256i index = indices(b, half);
    const Floats low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
    if (BITS <= 3) return low;
    const Floats high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
inline Floats read(const float *p) { return _mm256_loadu_ps(p); }
inline Floats zero() { return _mm256_setzero_ps(); }
inline Floats same(float f) { return _mm256_set1_ps(f); }
inline Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats added(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(Floats v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline void write(float *p, Floats v) { _mm256_storeu_ps(p, v); }
inline void write_fp16(uint16_t *p, Floats v) { _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, 0)); }
inline void write_bf16(uint16_t *p, Floats v) {
    const __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0b1000);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(packed));
}
typedef __m256i Words;
inline Words load_words(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
inline Words left_word(Words w, int n) { return _mm256_slli_epi32(w, n); }
inline Words right_word(Words w, int n) { return _mm256_srai_epi32(w, n); }
inline Words both_words(Words a, uint32_t mask) { return _mm256_and_si256(a, _mm256_set1_epi32((int)mask)); }
inline Words largest_byte(Words a, Words b) { return _mm256_max_epu8(a, b); }
inline Words no_words() { return _mm256_setzero_si256(); }
inline bool any_byte_from(Words w, int n) {
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(w, _mm256_set1_epi8((char)n)), w)) != 0;
}
inline Words where_byte(Words w, int n) { return _mm256_cmpeq_epi8(w, _mm256_set1_epi8((char)n)); }
inline Floats as_floats(Words w) { return _mm256_castsi256_ps(w); }
inline Words sixteen_bytes(const uint8_t *p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p)); }
inline Words bytes_at(Words sixteen, Words index) { return _mm256_shuffle_epi8(sixteen, index); }
inline Words added_bytes(Words a, Words b) { return _mm256_add_epi8(a, b); }
inline Words paired_low(Words a, Words b) { return _mm256_unpacklo_epi8(a, b); }
inline Words paired_high(Words a, Words b) { return _mm256_unpackhi_epi8(a, b); }
template <int FIRST> inline Floats from_lane(Floats v, float f) {
    return _mm256_blend_ps(v, _mm256_set1_ps(f), 0xFF << FIRST & 0xFF);
}
#endif

#if defined(__AVX2__)
constexpr int STEP = 2 * LANES;
constexpr bool LOOKED_UP = BITS <= 4 || (LANES == 16 && BITS <= 6), GATHERED = !INTEGER && EXPONENT == 0;
// The top exponent of five bits is fp16's infinity; numbers of formats that use it are halved.
constexpr bool HALVED = !INTEGER && EXPONENT == 5 && SPECIALS != 1;
constexpr float power_of_two(int n) { return n > 0 ? 2 * power_of_two(n - 1) : n < 0 ? power_of_two(n + 1) / 2 : 1; }
// The remaining factor of decoded numbers.
constexpr float FACTOR = LOOKED_UP || GATHERED ? 1 : power_of_two(INTEGER ? 1 - BIAS - MANTISSA : 15 - BIAS + HALVED);
struct Two { Floats low, high; };

template <int PLANE> inline Bytes codes(const uint8_t *row, int64_t i, int64_t size) {
    auto part = [&](auto number) {
        constexpr Piece of = piece(number.value);
        const Bytes b = load(row + (first(number.value) + PLANE % slices(number.value)) * size + i);
        if constexpr (of.width == 8) return b;
        else return moved(bits_of(b, PLANE / slices(number.value) * of.width, (1 << of.width) - 1), of.offset);
    };
    Bytes code = part(std::integral_constant<int, 0>());
    if constexpr (PIECES > 1) code = joined(code, part(std::integral_constant<int, 1>()));
    if constexpr (PIECES > 2) code = joined(code, part(std::integral_constant<int, 2>()));
    return code;
}

// fp16 numbers of codes of up to 5 exponent bits, FACTOR times too small; fp16 has their subnormals, NaN and infinity.
inline Halves fp16_of(Bytes b) {
    constexpr int unused = 16 - BITS, narrower = EXPONENT > 5 ? 0 : 5 - EXPONENT;
    constexpr int top = ((1 << (EXPONENT + MANTISSA)) - 1) << unused >> narrower;      // all ones but the sign
    constexpr int infinity = ((1 << EXPONENT) - 1) << (MANTISSA + unused) >> narrower;
    const Halves h = left(widened(b), unused);
    Halves number = h;
    if constexpr (EXPONENT < 5) {
        number = both(right(h, narrower), all(0x8000 | 0x7FFF >> narrower));
    } else if constexpr (HALVED) {
        const Halves magnitude = both(h, all(0x7FFF));
        number = either(larger(less(magnitude, all(0x400)), right(magnitude, 1)), both(h, all(0x8000)));
    }
    if constexpr (SPECIALS == 1 && EXPONENT < 5)
        return or_where_above(number, both(number, all(0x7FFF)), all(infinity - 1), all(0x7C00));
    if constexpr (SPECIALS == 2)
        return or_where_equal(number, both(h, all(0x7FFF)), all(top << narrower), all(0x7E00));
    if constexpr (SPECIALS == 3) return or_where_equal(number, h, all(0x8000), all(0x7E00));
    return number;
}

inline Two numbers(Bytes b, const float *table) {
    if constexpr (LOOKED_UP) return {looked_up(b, 0, table), looked_up(b, 1, table)};
    else if constexpr (INTEGER) {
        const Halves h = right(left(widened(b), 16 - BITS), 16 - BITS);
        return {from_int16(h, 0), from_int16(h, 1)};
    } else if constexpr (GATHERED) return {gathered(b, 0, table), gathered(b, 1, table)};
    else {
        const Halves h = fp16_of(b);
        return {from_fp16(h, 0), from_fp16(h, 1)};
    }
}
#else
constexpr int LANES = 1;        // no vectors
constexpr float FACTOR = 1;
#endif

// One block's scale for a whole vector; or, EACH, scales spread over a buffer, one for each weight.
inline bool vectors_straddle_blocks(const Weight &w) { return BLOCK && (COLUMNS % LANES || w.plane % LANES); }

void spread(const Weight &w, int64_t row, float *scales) {
    const int64_t begin = w.scales_of(row);
    for (int64_t k = 0; k < w.k; k += COLUMNS)
        std::fill(scales + k, scales + std::min<int64_t>(k + COLUMNS, w.k), w.scale(begin, k / COLUMNS));
}

#if defined(__AVX2__)
template <bool EACH, int PLANE>
inline Two scaled(const Weight &w, const uint8_t *packed, int64_t begin, int64_t i, const float *scales) {
    Two two = numbers(codes<PLANE>(packed, i, w.plane), w.table);
    if constexpr (BLOCK > 0) {
        const int64_t k = PLANE * w.plane + i;
        if constexpr (FACTOR != 1.0f) two = {times(two.low, same(FACTOR)), times(two.high, same(FACTOR))};
        if constexpr (EACH) return {times(two.low, read(scales + k)), times(two.high, read(scales + k + LANES))};
        else return {times(two.low, same(w.scale(begin, k / COLUMNS))),
                     times(two.high, same(w.scale(begin, (k + LANES) / COLUMNS)))};
    }
    return two;
}

// Prefetch the next rows, once per cache line: a row is often a page, and the CPU's prefetcher stops at the page's end.
template <int ROWS> inline void prefetch(const Weight &w, const uint8_t *at) {
    constexpr int regions = first(PIECES), AHEAD = ROWS < 4 ? 4 : ROWS;
    for (int r = 0; r < ROWS; ++r)
        for (int region = 0; region < regions; ++region)
            _mm_prefetch((const char *)at + (r + AHEAD) * w.row_bytes + region * w.plane, _MM_HINT_T0);
}

template <int PLANE, class Do> inline void each_plane(Do &&what) {
    if constexpr (PLANE < PLANES) {
        what(std::integral_constant<int, PLANE>());
        each_plane<PLANE + 1>(what);
    }
}
#endif

// ROWS rows of the weight times TOKENS rows of x [TOKENS, k] into out [TOKENS, n].
template <int ROWS, int TOKENS, bool EACH>
void multiply(const Weight &w, const float *x, int64_t row, float *out, int64_t n, float *scales) {
    const uint8_t *packed = w.packed + row * w.row_bytes;
    float sums[ROWS][TOKENS] = {};
    int64_t begin[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        begin[r] = w.scales_of(row + r);
        if constexpr (EACH) spread(w, row + r, scales + r * w.k);
    }
    int64_t i = 0;
#if defined(__AVX2__)
    Floats total[ROWS][TOKENS];
    for (auto &of_row : total) for (auto &of_token : of_row) of_token = zero();
    for (; i + STEP <= w.plane; i += STEP) {
        prefetch<ROWS>(w, packed + i);
        each_plane<0>([&](auto plane) {
            Two two[ROWS];
            for (int r = 0; r < ROWS; ++r)
                two[r] = scaled<EACH, plane.value>(w, packed + r * w.row_bytes, begin[r], i, scales + r * w.k);
            for (int t = 0; t < TOKENS; ++t) {
                const float *at = x + t * w.k + plane.value * w.plane + i;
                const Floats low = read(at), high = read(at + LANES);
                for (int r = 0; r < ROWS; ++r)
                    total[r][t] = added(two[r].high, high, added(two[r].low, low, total[r][t]));
            }
        });
    }
    for (int r = 0; r < ROWS; ++r)
        for (int t = 0; t < TOKENS; ++t) sums[r][t] = sum(total[r][t]) * (BLOCK ? 1.0f : FACTOR);
#endif
    for (; i < w.plane; ++i)
        for (int plane = 0; plane < PLANES; ++plane)
            for (int r = 0; r < ROWS; ++r) {
                const float number = number_at(w, packed + r * w.row_bytes, begin[r], plane, i);
                for (int t = 0; t < TOKENS; ++t) sums[r][t] += number * x[t * w.k + plane * w.plane + i];
            }
    for (int r = 0; r < ROWS; ++r)
        for (int t = 0; t < TOKENS; ++t) out[t * n + row + r] = BLOCK ? sums[r][t] : sums[r][t] * w.scale(begin[r], 0);
}

template <int ROWS, bool EACH>
void multiply_tokens(const Weight &w, const float *x, int64_t m, int64_t row, float *out, int64_t n, float *scales) {
    int64_t t = 0;
    for (; t + 4 <= m; t += 4) multiply<ROWS, 4, EACH>(w, x + t * w.k, row, out + t * n, n, scales);
    if (m - t >= 2) { multiply<ROWS, 2, EACH>(w, x + t * w.k, row, out + t * n, n, scales); t += 2; }
    if (m - t == 1) multiply<ROWS, 1, EACH>(w, x + t * w.k, row, out + t * n, n, scales);
}

// One token, by words: for E4M3 and E5M2 of any convention, E3M2, E2M3 and 4 bits.
//
// A chunk is a vector of words: four vectors of numbers for each plane, in an order in which x is stored once. FP8
// bytes become fp32 by nine instructions for four vectors, FACTOR_OF_BYTES times too small: x is scaled up to
// compensate, which keeps products out of the subnormal range. NaN and infinity would be read as numbers, so rows that
// have them are computed again. FP6 codes first become such bytes. Four bits are looked up as the two bytes of a bf16.

#if defined(__AVX2__)
constexpr int CHUNK = 4 * LANES;
constexpr bool FP8_WORDS = BITS == 8 && !INTEGER && (EXPONENT == 4 || EXPONENT == 5);
constexpr bool FP6_WORDS = BITS == 6 && !INTEGER && (EXPONENT == 2 || EXPONENT == 3) && SPECIALS == 0;
constexpr bool FP4_WORDS = BITS == 4 && BF16_EXACT;
constexpr bool BY_WORDS = (FP8_WORDS || FP6_WORDS || FP4_WORDS) && (BLOCK % CHUNK == 0 || BLOCK == 16 || BLOCK == 32);
constexpr int LARGEST_X = 100;      // the exponent of x's largest number, scaled
// By how much an FP6 code of a normal number grows as it becomes a byte: subnormal numbers, too, are then normal.
constexpr int RAISED = FP6_WORDS ? 48 : 0;
constexpr float FACTOR_OF_BYTES = FP4_WORDS || !BY_WORDS ? 1 : power_of_two(127 - BIAS - (RAISED >> MANTISSA));
struct Four { Floats part[4]; };

// Where number `at` of a chunk lies along K.
inline int place(int at) {
    const int part = at / LANES, lane = at % LANES;
    return FP4_WORDS ? lane / 4 * 16 + part / 2 * 8 + lane % 4 * 2 + part % 2 : 4 * lane + part;
}

// Bytes of sign, exponent and MANTISSA bits of mantissa: each becomes the upper bits of a word.
inline Four from_bytes(Words w) {
    constexpr int shift = MANTISSA + 1;
    constexpr uint32_t mask = 0x80000000u | 0x7F000000u >> shift;
    const Words odd = right(w, shift), even = right(left(w, 8), shift);
    return {{as_floats(both_words(left_word(even, 16), mask)), as_floats(both_words(left_word(odd, 16), mask)),
             as_floats(both_words(even, mask)), as_floats(both_words(odd, mask))}};
}

// The two bytes of the bf16 of each 4-bit code; for FP6, what is added to the code's lower four bits.
struct Lookup { Words low, high; };

inline Lookup lookup_of(const float *table) {
    uint8_t low[16], high[16];
    for (int code = 0; code < 16; ++code) {
        const float number = FP6_WORDS ? table[code] / FACTOR_OF_BYTES : table[code];
        uint32_t bits;
        std::memcpy(&bits, &number, 4);
        low[code] = FP6_WORDS ? (bits >> (23 - MANTISSA)) - code : bits >> 16, high[code] = bits >> 24;
    }
    return {sixteen_bytes(low), sixteen_bytes(high)};
}

// The lower four bits of codes of 4 or 6 bits.
template <int PLANE> inline Words four_bits(const uint8_t *at, int64_t size) {
    const Words two = load_words(at + PLANE % slices(0) * size);
    return both(PLANE < slices(0) ? two : right(two, 4), all(0x0F0F));
}

// Bytes of FP6. The upper half of magnitudes, exponent's top bit 1, is RAISED by that bit's place in the byte, 64
// instead of 16, and is not looked up: its index has bit 7.
template <int PLANE> inline Words bytes_of_fp6(const uint8_t *at, int64_t size, const Lookup &lookup) {
    const Words four = load_words(at + first(1) * size);
    const Words sign_and_top = both(PLANE < 3 ? left(four, 6 - 2 * PLANE) : four, all(0xC0C0));
    const Words code = either(sign_and_top, four_bits<PLANE>(at, size));
    return added_bytes(code, bytes_at(lookup.low, added_bytes(code, sign_and_top)));
}

template <int PLANE> inline Four numbers_of(const uint8_t *at, int64_t size, const Lookup &lookup) {
    if constexpr (FP8_WORDS) return from_bytes(load_words(at));
    else if constexpr (FP6_WORDS) return from_bytes(bytes_of_fp6<PLANE>(at, size, lookup));
    else {
        const Words index = four_bits<PLANE>(at, size), low = bytes_at(lookup.low, index), high = bytes_at(lookup.high, index);
        const Words first = paired_low(low, high), second = paired_high(low, high);
        return {{as_floats(left_word(first, 16)), as_floats(both_words(first, 0xFFFF0000)),
                 as_floats(left_word(second, 16)), as_floats(both_words(second, 0xFFFF0000))}};
    }
}

// The scales of a chunk from block `block` on: of every BLOCK weights along K, a quarter as many lanes.
inline Floats scales_of_chunk(const Weight &w, int64_t begin, int64_t block) {
    Floats scales = same(w.scale(begin, block));
    if constexpr (BLOCK < CHUNK) scales = from_lane<BLOCK / 4>(scales, w.scale(begin, block + 1));
    if constexpr (2 * BLOCK < CHUNK) {
        scales = from_lane<2 * BLOCK / 4>(scales, w.scale(begin, block + 2));
        scales = from_lane<3 * BLOCK / 4>(scales, w.scale(begin, block + 3));
    }
    return scales;
}

// The largest byte of a row: from `FIRST_SPECIAL` on, the row has NaN or infinity.
constexpr int FIRST_SPECIAL = SPECIALS == 1 ? ((1 << EXPONENT) - 1) << MANTISSA : SPECIALS == 2 ? 0x7F : 0x80;
inline Words specials(const uint8_t *at, Words before) {
    if constexpr (!FP8_WORDS || SPECIALS == 0) return before;
    const Words w = load_words(at);
    if constexpr (SPECIALS == 3) return largest_byte(before, where_byte(w, 0x80));
    else return largest_byte(before, both_words(w, 0x7F7F7F7F));
}

// x [k] in the order of chunks, scaled up, without the columns past a plane's last chunk. factor: that of the sums.
std::vector<float> ordered(const Weight &w, const float *x, double &factor) {
    std::vector<float> to(w.k);
    float up = 1, further = 1;
    factor = 1;
    if constexpr (!FP4_WORDS) {
        float largest = 0;
        for (int64_t k = 0; k < w.k; ++k) largest = std::max(largest, std::fabs(x[k]));
        const int exponent = largest > 0 && std::isfinite(largest) ? LARGEST_X - std::ilogb(largest) : 0;
        up = std::ldexp(1.0f, exponent / 2), further = std::ldexp(1.0f, exponent - exponent / 2);
        factor = std::ldexp(double(FACTOR_OF_BYTES), -exponent);
    }
    for (int plane = 0; plane < PLANES; ++plane)
        for (int64_t i = plane * w.plane; i + CHUNK <= (plane + 1) * w.plane; i += CHUNK)
            for (int n = 0; n < CHUNK; ++n) to[i + n] = x[i + place(n)] * up * further;
    return to;
}

// ROWS rows of the weight times one token x [k]; `to` is x as `ordered` returns it.
template <int ROWS>
void multiply_words(const Weight &w, const float *x, const float *to, double factor, int64_t row, float *out, int64_t n) {
    const uint8_t *packed = w.packed + row * w.row_bytes;
    const Lookup lookup = lookup_of(w.table);
    Floats total[ROWS];
    Words seen[ROWS];
    int64_t begin[ROWS];
    for (int r = 0; r < ROWS; ++r) seen[r] = no_words(), total[r] = zero(), begin[r] = w.scales_of(row + r);
    int64_t i = 0;
    for (; i + CHUNK <= w.plane; i += CHUNK) {
        prefetch<ROWS>(w, packed + i);
        each_plane<0>([&](auto plane) {
            const int64_t k = plane.value * w.plane + i, block = uint64_t(k) / COLUMNS;
            for (int r = 0; r < ROWS; ++r) {
                const uint8_t *at = packed + r * w.row_bytes + i;
                seen[r] = specials(at, seen[r]);
                const Four four = numbers_of<plane.value>(at, w.plane, lookup);
                Floats sum = BLOCK ? times(four.part[0], read(to + k)) : added(four.part[0], read(to + k), total[r]);
                for (int part = 1; part < 4; ++part) sum = added(four.part[part], read(to + k + part * LANES), sum);
                if constexpr (BLOCK == 0) total[r] = sum;
                else total[r] = added(sum, scales_of_chunk(w, begin[r], block), total[r]);
            }
        });
    }
    for (int r = 0; r < ROWS; ++r) {
        if (FP8_WORDS && SPECIALS && any_byte_from(seen[r], FIRST_SPECIAL)) {
            multiply<1, 1, false>(w, x, row + r, out, n, nullptr);
            continue;
        }
        double whole = sum(total[r]) * factor;
        for (int64_t rest = i; rest < w.plane; ++rest)
            for (int plane = 0; plane < PLANES; ++plane) {
                const int64_t k = plane * w.plane + rest;
                const double number = w.table[code_at(packed + r * w.row_bytes, plane, rest, w.plane)];
                whole += number * x[k] * (BLOCK ? w.scale(begin[r], k / COLUMNS) : 1.0f);
            }
        out[row + r] = BLOCK ? whole : whole * w.scale(begin[r], 0);
    }
}
#endif

constexpr int ROWS = 4;

template <bool EACH> void product_of(const Weight &w, const float *x, int64_t m, float *out, int64_t n, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scales(EACH ? ROWS * w.k : 0);
#pragma omp for schedule(static)
        for (int64_t group = 0; group < (n + ROWS - 1) / ROWS; ++group) {
            int64_t row = group * ROWS;
            if (row + ROWS <= n) multiply_tokens<ROWS, EACH>(w, x, m, row, out, n, scales.data());
            else for (; row < n; ++row) multiply_tokens<1, EACH>(w, x, m, row, out, n, scales.data());
        }
    }
}

#if defined(__AVX2__)
void product_by_words(const Weight &w, const float *x, float *out, int64_t n, int threads) {
    double factor;
    const std::vector<float> to = ordered(w, x, factor);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t group = 0; group < (n + ROWS - 1) / ROWS; ++group) {
        int64_t row = group * ROWS;
        if (row + ROWS <= n) multiply_words<ROWS>(w, x, to.data(), factor, row, out, n);
        else for (; row < n; ++row) multiply_words<1>(w, x, to.data(), factor, row, out, n);
    }
}
#endif

inline uint16_t bf16_of(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

struct BF16 { uint16_t bits; };
typedef _Float16 FP16;

template <class Out> inline void put(Out *p, float f) {
    if constexpr (std::is_same_v<Out, BF16>) p->bits = bf16_of(f);
    else *p = f;
}
#if defined(__AVX2__)
template <class Out> inline void put_vector(Out *p, Floats v) {
    if constexpr (std::is_same_v<Out, BF16>) write_bf16(&p->bits, v);
    else if constexpr (std::is_same_v<Out, FP16>) write_fp16((uint16_t *)p, v);
    else write(p, v);
}
#endif

// Row `row` of the weight, scaled, into out [k].
template <class Out, bool EACH> void decode_row(const Weight &w, int64_t row, Out *out, float *scales) {
    const uint8_t *packed = w.packed + row * w.row_bytes;
    const int64_t begin = w.scales_of(row);
    const float of_row = BLOCK ? 1.0f : w.scale(begin, 0);
    if constexpr (EACH) spread(w, row, scales);
    int64_t i = 0;
#if defined(__AVX2__)
    const float of_vectors = FACTOR * of_row;
    const bool in_range = BLOCK || of_row == 0 || std::isnormal(of_vectors);
    for (; in_range && i + STEP <= w.plane; i += STEP)
        each_plane<0>([&](auto plane) {
            Two two = scaled<EACH, plane.value>(w, packed, begin, i, scales);
            if constexpr (BLOCK == 0) two = {times(two.low, same(of_vectors)), times(two.high, same(of_vectors))};
            Out *at = out + plane.value * w.plane + i;
            put_vector(at, two.low), put_vector(at + LANES, two.high);
        });
#endif
    for (; i < w.plane; ++i)
        for (int plane = 0; plane < PLANES; ++plane)
            put(out + plane * w.plane + i, number_at(w, packed, begin, plane, i) * of_row);
}

template <class Out, bool EACH> void decode_of(const Weight &w, int64_t begin, int64_t end, Out *out, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scales(EACH ? w.k : 0);
#pragma omp for schedule(static)
        for (int64_t row = begin; row < end; ++row) decode_row<Out, EACH>(w, row, out + (row - begin) * w.k, scales.data());
    }
}

template <class Out> void decode_to(const Weight &w, int64_t begin, int64_t end, void *out, int threads) {
    if (vectors_straddle_blocks(w)) decode_of<Out, true>(w, begin, end, static_cast<Out *>(out), threads);
    else decode_of<Out, false>(w, begin, end, static_cast<Out *>(out), threads);
}

// Several tokens in bf16, by the CPU's products of pairs: numbers of a code are exact in bf16, and so are those under
// MX's scales; other block scales are rounded with them. Sums are in fp32.

#if defined(__AVX512BF16__)
constexpr int ROWS_AT_ONCE = 32;                    // per thread
constexpr int TILE = 1024 / PLANES / STEP * STEP;   // along a plane: 16 tokens of x then fit a first-level cache

inline float float_of(uint16_t bf16) {
    const uint32_t bits = uint32_t(bf16) << 16;
    float number;
    std::memcpy(&number, &bits, 4);
    return number;
}

// With one scale per row, codes of up to 6 bits are looked up as bf16 at once.
constexpr bool AS_PAIRS = BLOCK == 0 && BITS <= 6 && BF16_EXACT;
struct PairLookup { __m512i low, high; };

inline PairLookup pair_lookup(const float *table) {
    const auto part = [&](int at) { return (__m512i)_mm512_cvtne2ps_pbh(read(table + at + 16), read(table + at)); };
    return {part(0), part(32)};
}

template <int PLANE>
inline __m512bh pairs_of(const Weight &w, const PairLookup &lookup, const uint8_t *packed, int64_t begin, int64_t i) {
    if constexpr (AS_PAIRS) {
        const Halves index = widened(codes<PLANE>(packed, i, w.plane));
        return (__m512bh)(BITS <= 5 ? _mm512_permutexvar_epi16(index, lookup.low)
                                    : _mm512_permutex2var_epi16(lookup.low, index, lookup.high));
    }
    const Two two = scaled<false, PLANE>(w, packed, begin, i, nullptr);
    return _mm512_cvtne2ps_pbh(two.high, two.low);
}

// x [m, k] by vectors: [planes, plane / STEP, m, STEP], without the columns past a plane's last whole vector. Rows of x
// are often a power of two of bytes apart, so that they share few sets of a cache.
std::vector<uint16_t> by_vectors(const Weight &w, const uint16_t *x, int64_t m) {
    const int64_t vectors = w.plane / STEP;
    std::vector<uint16_t> to(PLANES * vectors * m * STEP);
    for (int64_t at = 0; at < PLANES * vectors * m; ++at) {
        const int64_t token = at % m, vector = at / m % vectors, plane = at / m / vectors;
        std::memcpy(&to[at * STEP], x + token * w.k + plane * w.plane + vector * STEP, STEP * sizeof(uint16_t));
    }
    return to;
}

// Adds ROWS rows times TOKENS of m tokens, by vectors, over [from, to) of each plane to sums [ROWS, 16].
template <int ROWS, int TOKENS>
void dot_tile(const Weight &w, const uint16_t *x, int64_t m, int64_t row, int64_t from, int64_t to, float *sums) {
    const int64_t vectors = w.plane / STEP;
    const PairLookup lookup = pair_lookup(w.table);
    const uint8_t *packed = w.packed + row * w.row_bytes;
    Floats total[ROWS][TOKENS];
    int64_t begin[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        begin[r] = w.scales_of(row + r);
        for (int t = 0; t < TOKENS; ++t) total[r][t] = zero();
    }
    for (int64_t i = from; i < to; i += STEP) {
        prefetch<ROWS>(w, packed + i);
        each_plane<0>([&](auto plane) {
            __m512bh pairs[ROWS];
            for (int r = 0; r < ROWS; ++r)
                pairs[r] = pairs_of<plane.value>(w, lookup, packed + r * w.row_bytes, begin[r], i);
            for (int t = 0; t < TOKENS; ++t) {
                const uint16_t *at = x + ((plane.value * vectors + i / STEP) * m + t) * STEP;
                const __m512bh of_token = (__m512bh)_mm512_loadu_si512(at);
                for (int r = 0; r < ROWS; ++r) total[r][t] = _mm512_dpbf16_ps(total[r][t], pairs[r], of_token);
            }
        });
    }
    for (int r = 0; r < ROWS; ++r)
        for (int t = 0; t < TOKENS; ++t) sums[r * 16 + t] += sum(total[r][t]);
}

template <int ROWS, int TOKENS>
void dot_rows(const Weight &w, const uint16_t *x, const uint16_t *vectors, int64_t m, int64_t begin, int64_t end,
              float *out, int64_t n, int64_t tokens) {
    float sums[ROWS_AT_ONCE * 16] = {};
    const int64_t whole = w.plane / STEP * STEP;
    for (int64_t from = 0; from < whole; from += TILE) {
        const int64_t to = std::min<int64_t>(from + TILE, whole);
        int64_t row = begin;
        for (; row + ROWS <= end; row += ROWS) dot_tile<ROWS, TOKENS>(w, vectors, m, row, from, to, sums + (row - begin) * 16);
        for (; row < end; ++row) dot_tile<1, TOKENS>(w, vectors, m, row, from, to, sums + (row - begin) * 16);
    }
    for (int64_t row = begin; row < end; ++row) {
        const int64_t scales = w.scales_of(row);
        for (int64_t t = 0; t < tokens; ++t) {
            float rest = 0;
            for (int64_t i = whole; i < w.plane; ++i)
                for (int plane = 0; plane < PLANES; ++plane) {
                    const float number = number_at(w, w.packed + row * w.row_bytes, scales, plane, i);
                    rest += number * float_of(x[t * w.k + plane * w.plane + i]);
                }
            const float all = sums[(row - begin) * 16 + t] * (BLOCK ? 1.0f : FACTOR) + rest;
            out[t * n + row] = BLOCK ? all : all * w.scale(scales, 0);
        }
    }
}
#endif

}  // namespace

// x fp32 [m, k] times the weight into out fp32 [m, n].
extern "C" void product(const Weight *w, const float *x, int64_t m, float *out, int64_t n, int threads) {
#if defined(__AVX2__)
    if constexpr (BY_WORDS)
        if (m == 1 && (BLOCK == 0 || w->plane % CHUNK == 0)) return product_by_words(*w, x, out, n, threads);
#endif
    if (vectors_straddle_blocks(*w)) product_of<true>(*w, x, m, out, n, threads);
    else product_of<false>(*w, x, m, out, n, threads);
}

#if defined(__AVX512BF16__)
// x bf16 [m rounded up to a multiple of 4, k] times the weight into out fp32 [m, n], by pairs unless the CPU is slow at
// them; false where blocks straddle vectors, and nothing is done.
extern "C" bool product_bf16(const Weight *w, const uint16_t *x, int64_t m, float *out, int64_t n, int threads) {
    if (vectors_straddle_blocks(*w)) return false;
#if !defined(PAIRS_ON_EVERY_CPU)        // which tests define
    // Emerald Rapids starts a product of pairs every other cycle, and two of floats in each: half as many numbers.
    if (!AS_PAIRS && __builtin_cpu_is("intel")) {
        std::vector<float> floats(m * w->k);
        std::transform(x, x + m * w->k, floats.begin(), float_of);
        product(w, floats.data(), m, out, n, threads);
        return true;
    }
#endif
    const int64_t padded = (m + 3) / 4 * 4;
    const std::vector<uint16_t> vectors = by_vectors(*w, x, padded);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t begin = 0; begin < n; begin += ROWS_AT_ONCE) {
        const int64_t end = std::min(begin + ROWS_AT_ONCE, n);
        for (int64_t t = 0; t < m;) {
            const auto rows = [&](auto kernel, int64_t tokens) {
                kernel(*w, x + t * w->k, vectors.data() + t * STEP, padded, begin, end, out + t * n, n,
                       std::min(m - t, tokens));
                t += tokens;
            };
            if (m - t > 12) rows(dot_rows<1, 16>, 16);
            else if (m - t > 4) rows(dot_rows<2, 8>, 8);
            else rows(dot_rows<4, 4>, 4);
        }
    }
    return true;
}
#endif

// Rows [begin, end) of the weight, scaled, into out [end - begin, k] of fp32 (0), or rounded to bf16 (1) or fp16 (2).
extern "C" void decode(const Weight *w, int64_t begin, int64_t end, void *out, int kind, int threads) {
    if (kind == 1) decode_to<BF16>(*w, begin, end, out, threads);
    else if (kind == 2) decode_to<FP16>(*w, begin, end, out, threads);
    else decode_to<float>(*w, begin, end, out, threads);
}

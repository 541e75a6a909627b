// One register of floats, as wide as the level has, written with the compiler's vector extensions: the same source is
// SSE, AVX2, AVX-512 and NEON. Only conversions and AVX-512's masks are asked for by name.
#pragma once

#include <cstdint>
#include <type_traits>  // types, no code
#include <utility>      // integer_sequence: a type, no code

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__SSE4_1__)
#include <smmintrin.h>
#endif

#include "kernels.h"

namespace trilby::TRILBY_LEVEL {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

constexpr float INFINITE = __builtin_inff();

static inline Vector load(const float* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}

static inline void store(float* to, Vector vector) { __builtin_memcpy(to, &vector, sizeof vector); }

static inline void clear(float* floats, int64_t count) {
  __builtin_memset(floats, 0, static_cast<size_t>(count) * sizeof(float));
}

// x - 0 is x for every x, so that the compiler drops the subtraction; 0 + x is not (x = -0), and it cannot.
static inline Vector broadcast(float value) { return value - Vector{}; }

static inline Vector lane_numbers() {
  Vector lanes;
  for (int i = 0; i < LANES; i++) lanes[i] = static_cast<float>(i);
  return lanes;
}

// Whether any lane is not 0: of a comparison, whether it holds anywhere.
static inline bool any(Integers lanes) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes) != 0;
#else
  int32_t united = 0;
  for (int i = 0; i < LANES; i++) united |= lanes[i];
  return united != 0;
#endif
}

// `a` where it is the larger or a NaN of b would be lost; a NaN in `a` is dropped, as the running maximum wants.
static inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

static inline Vector square_root(Vector vector) {
#if defined(__AVX512F__)
  return (Vector)_mm512_sqrt_ps((__m512)vector);
#elif defined(__AVX2__)
  return (Vector)_mm256_sqrt_ps((__m256)vector);
#else
  for (int i = 0; i < LANES; i++) vector[i] = __builtin_sqrtf(vector[i]);
  return vector;
#endif
}

static inline float horizontal_sum(Vector vector) {
  float lanes[LANES];
  store(lanes, vector);
  for (int width = LANES / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// 2^x = (1 + rest) · power for x <= 0, or x a NaN, or x = -inf (power 0). x = n + f with n the nearest integer; 2^f by
// the polynomial of degree 6 with 2^0 = 1 exactly that is closest to it in relative error on [-0.5, 0.5], 2.0e-9 before
// rounding (degree 5: 9.1e-8, 1.4 ulp after it).
struct PowerOfTwo {
  Vector rest, power;
};

// (2^f - 1) / f for f in [-0.5, 0.5].
static inline Vector power_of_fraction(Vector f) {
  Vector p = broadcast(1.5353362060e-4f);
  p = p * f + 1.3398874588e-3f;
  p = p * f + 9.6184373585e-3f;
  p = p * f + 5.5503324707e-2f;
  p = p * f + 2.4022647914e-1f;
  return p * f + 6.9314720286e-1f;
}

static inline PowerOfTwo power_of_two(Vector x) {
  const Vector clamped = x < -150.0f ? broadcast(-150.0f) : x;  // a NaN compares false and stays
  const Vector shifted = clamped + 12582912.0f;                 // 1.5 · 2^23: rounds to an integer in the low bits
  const Vector f = clamped - (shifted - 12582912.0f);           // [-0.5, 0.5]
  const Vector p = power_of_fraction(f);
  // The integer n sits in the low bits of `shifted`; 2^n is its exponent field. Below -126 the result is 0.
  const Integers n = (Integers)shifted << 23;
  const Integers one = (Integers)broadcast(1.0f);
  return {p * f, (Vector)(clamped < -126.0f ? Integers{} : n + one)};
}

#if defined(__AVX512BF16__)
// 2^x for x <= 0, here for x < 127, too, or x a NaN: within 1.3 ulp of normal numbers, 0 below 2^-126. 8 instructions,
// for probabilities that become bf16; their sum, as logsumexp, stays as exact as float32. 2^f by the polynomial of
// degree 5 with 2^0 = 1 exactly that is closest to it in relative error on [0, 1), 8.2e-8 before rounding. Scaling to a
// result below 2^-126 would be done in microcode: 77 ns instead of 1.4 were measured.
static inline Vector exp2_of_nonpositive(Vector x) {
  const Vector f = (Vector)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vector p = broadcast(1.8671300495043397e-3f);
  p = p * f + 9.0170307084918022e-3f;
  p = p * f + 5.5799912661314011e-2f;
  p = p * f + 2.4016444385051727e-1f;
  p = p * f + 6.9315129518508911e-1f;
  p = p * f + 1.0f;
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, (__m512)broadcast(-126.0f), _CMP_NLT_UQ);
  return (Vector)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)x);
}
#elif defined(__AVX512F__)
// 2^x for x <= 0 or x a NaN: within 0.94 ulp for results that are normal numbers, 0 below 2^-126, which are masked:
// scaling to them would be done in microcode. 10 instructions; with the logarithm below, attention's forward is 1.03
// to 1.08 times as fast as with the 13 of the other levels, at T = 128 to 1024.
static inline Vector exp2_of_nonpositive(Vector x) {
  const Vector f = (Vector)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vector power = power_of_fraction(f) * f + 1.0f;
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, (__m512)broadcast(-126.0f), _CMP_NLT_UQ);
  return (Vector)_mm512_maskz_scalef_ps(normal, (__m512)power, (__m512)(x - f));
}
#else
// 2^x for x <= 0 or x a NaN: within 0.7 ulp for results that are normal numbers, 0 below 2^-126. 13 instructions.
static inline Vector exp2_of_nonpositive(Vector x) {
  const PowerOfTwo result = power_of_two(x);
  return (result.rest + 1.0f) * result.power;
}
#endif

// The natural logarithm of x >= 2^-126, of 0 (-inf), of infinity or a NaN. x = m · 2^n with m in [0.71, 1.42), and
// log(m) = 2 · artanh((m - 1) / (m + 1)), whose series is cut where it is 2e-9 off: within 2 ulp.
static inline Vector logarithm(Vector x) {
  const Integers n = ((Integers)x - 0x3f3504f3) >> 23;
  const Vector m = (Vector)((Integers)x - (n << 23)), exponent = __builtin_convertvector(n, Vector);
  const Vector s = (m - 1.0f) / (m + 1.0f), square = s * s;
  Vector p = broadcast(2.0f / 9.0f);
  p = p * square + 2.0f / 7.0f;
  p = p * square + 2.0f / 5.0f;
  p = p * square + 2.0f / 3.0f;
  const Vector high = exponent * 0.693359375f, low = exponent * -2.12194440e-4f;  // log(2) in two parts
  const Vector result = high + (2.0f * s + (p * square * s + low));
  const Vector finite = x < INFINITE ? result : x + x;
  return x == 0.0f ? broadcast(-INFINITE) : finite;
}

// The hyperbolic tangent, from 1 - e^(-2|x|), which is exact to a few ulp for the smallest x, too: within 3 ulp.
static inline Vector tanh(Vector x) {
  const Vector magnitude = (Vector)((Bits)x & 0x7fffffffu);
  const PowerOfTwo decay = power_of_two(magnitude * -2.8853900817779268f);  // -2 · log2(e)
  const Vector lost = (1.0f - decay.power) - decay.rest * decay.power;
  const Vector result = lost / (2.0f - lost);
  return (Vector)((Bits)result | ((Bits)x & 0x80000000u));
}

// One instruction; __builtin_convertvector takes four of gcc 12, which widens halves of a register and joins them.
static inline Bits widened(Halves halves) {
#if defined(__AVX512F__)
  return (Bits)_mm512_cvtepu16_epi32((__m256i)halves);
#elif defined(__AVX2__)
  return (Bits)_mm256_cvtepu16_epi32((__m128i)halves);
#else
  return __builtin_convertvector(halves, Bits);
#endif
}

// LANES bytes from memory. Asked for by name: gcc 12 widens a vector of bytes element by element.
static inline Integers widened(const int8_t* from) {
#if defined(__AVX512F__)
  return (Integers)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
  return (Integers)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#elif defined(__SSE4_1__)
  return (Integers)_mm_cvtepi8_epi32(_mm_loadu_si32(from));
#else
  typedef int8_t Bytes __attribute__((vector_size(LANES)));
  Bytes bytes;
  __builtin_memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, Integers);
#endif
}

static inline Vector from_bfloat16(Halves halves) { return (Vector)(widened(halves) << 16); }

// Rounds to nearest even; a NaN keeps its sign and becomes quiet. The levels for bf16, which round probabilities so,
// have an instruction for it, to which what is below 2^-126 is 0.
static inline Halves to_bfloat16(Vector vector) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)vector);
#else
  const Bits bits = (Bits)vector;
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits quiet_nan = (bits >> 16) | 0x40u;
  return __builtin_convertvector(vector != vector ? quiet_nan : rounded, Halves);
#endif
}

static inline Vector from_float16(Halves halves) {
#if defined(__AVX512F__)
  return (Vector)_mm512_cvtph_ps((__m256i)halves);
#elif defined(__F16C__)
  return (Vector)_mm256_cvtph_ps((__m128i)halves);
#else
  // Exponent and mantissa moved into place and multiplied by 2^112 also mends subnormals; the largest exponent is
  // inf or NaN and gets all exponent bits set.
  const Bits bits = widened(halves);
  const Bits magnitude = bits & 0x7fffu;
  const Vector scaled = (Vector)(magnitude << 13) * 0x1p112f;
  const Bits special = (magnitude << 13) | 0x7f800000u;
  const Bits finite = (Bits)scaled;
  return (Vector)((magnitude >= 0x7c00u ? special : finite) | ((bits & 0x8000u) << 16));
#endif
}

static inline Halves to_float16(Vector vector) {
#if defined(__AVX512F__)
  return (Halves)_mm512_cvtps_ph((__m512)vector, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (Halves)_mm256_cvtps_ph((__m256)vector, _MM_FROUND_TO_NEAREST_INT);
#else
  // Rounds in the float's own adder: normals by the bias trick of to_bfloat16 at bit 13, subnormals by adding 0.5,
  // whose last place is fp16's smallest step.
  const Bits sign = ((Bits)vector >> 16) & 0x8000u;
  const Bits bits = (Bits)vector & 0x7fffffffu;
  const Bits subnormal = (Bits)((Vector)bits + 0.5f) - 0x3f000000u;
  const Bits normal = (bits + 0xfffu + ((bits >> 13) & 1u) - 0x38000000u) >> 13;
  const Bits finite = bits < 0x38800000u ? subnormal : normal;
  const Bits overflow = bits > 0x7f800000u ? Bits{} + 0x7e00u : Bits{} + 0x7c00u;
  return __builtin_convertvector((bits >= 0x477ff000u ? overflow : finite) | sign, Halves);
#endif
}

// Elements as they lie in memory.
struct Float32 {
  using Element = float;
  static Vector load_vector(const float* from) { return load(from); }
  static void store_vector(float* to, Vector vector) { store(to, vector); }
};

template <Vector (*WIDEN)(Halves), Halves (*NARROW)(Vector)>
struct SixteenBits {
  using Element = uint16_t;
  static Vector widened(Halves halves) { return WIDEN(halves); }
  static Halves narrowed(Vector vector) { return NARROW(vector); }
  static Vector load_vector(const uint16_t* from) {
    Halves halves;
    __builtin_memcpy(&halves, from, sizeof halves);
    return widened(halves);
  }
  static void store_vector(uint16_t* to, Vector vector) {
    const Halves halves = narrowed(vector);
    __builtin_memcpy(to, &halves, sizeof halves);
  }
};

using BFloat16 = SixteenBits<from_bfloat16, to_bfloat16>;
using Float16 = SixteenBits<from_float16, to_float16>;

// Calls visit(Float32{}), visit(BFloat16{}) or visit(Float16{}).
template <class Visit>
static inline void in_format(Dtype dtype, const Visit& visit) {
  switch (dtype) {
    case Dtype::float32: return visit(Float32{});
    case Dtype::bfloat16: return visit(BFloat16{});
    case Dtype::float16: return visit(Float16{});
  }
}

// A loop over a few elements is called, not inlined: unrolled and vectorized wherever a row ends, it was much of what
// the compiler had to do.
template <class Element>
static __attribute__((noinline)) void copy_elements(Element* to, const Element* from, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = from[i];
}

// The first `count` elements, 0 <= count <= LANES, the rest 0: nothing past them is read. AVX-512 has masks for that,
// and AVX2 for loads of floats.
template <class Format>
static inline Vector load_some(const typename Format::Element* from, int64_t count) {
#if defined(__AVX512BW__)
  const auto lanes = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (std::is_same_v<Format, Float32>) return (Vector)_mm512_maskz_loadu_ps(lanes, from);
  if constexpr (sizeof(typename Format::Element) == 2)
    return Format::widened((Halves)_mm256_maskz_loadu_epi16(lanes, from));
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<Format, Float32>) {
    Integers lanes;
    for (int i = 0; i < LANES; i++) lanes[i] = i;
    return (Vector)_mm256_maskload_ps(from, (__m256i)(lanes < static_cast<int32_t>(count)));
  }
#endif
  typename Format::Element elements[LANES] = {};
  if (__builtin_constant_p(count) && count == 1)
    elements[0] = from[0];
  else
    copy_elements(elements, from, count);
  return Format::load_vector(elements);
}

template <class Format>
static inline void store_some(typename Format::Element* to, Vector vector, int64_t count) {
#if defined(__AVX512BW__)
  const auto lanes = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (std::is_same_v<Format, Float32>) return _mm512_mask_storeu_ps(to, lanes, (__m512)vector);
  if constexpr (sizeof(typename Format::Element) == 2)
    return _mm256_mask_storeu_epi16(to, lanes, (__m256i)Format::narrowed(vector));
#endif
  typename Format::Element elements[LANES];
  Format::store_vector(elements, vector);
  copy_elements(to, elements, count);
}

// Round `side` of a transposition: exchanges the blocks of that side which lie off the diagonal of rows a and b.
template <int SIDE, int... LANE>
static inline void exchange_blocks(Vector& a, Vector& b, std::integer_sequence<int, LANE...>) {
  const Vector first = __builtin_shufflevector(a, b, (LANE & SIDE ? LANE - SIDE + LANES : LANE)...);
  const Vector second = __builtin_shufflevector(a, b, (LANE & SIDE ? LANE + LANES : LANE + SIDE)...);
  a = first;
  b = second;
}

// Swaps rows and columns of LANES registers in log2(LANES) rounds: 64 two-source shuffles for AVX-512's 256 elements.
template <int SIDE = 1>
static inline void transpose(Vector (&rows)[LANES]) {
  for (int i = 0; i < LANES; i++) {
    if (!(i & SIDE)) exchange_blocks<SIDE>(rows[i], rows[i + SIDE], std::make_integer_sequence<int, LANES>{});
  }
  if constexpr (2 * SIDE < LANES) transpose<2 * SIDE>(rows);
}

// Lane i of the result is the sum of the lanes of rows[i], added in the order of horizontal_sum: the halves of each
// row, then the halves of these, two rows in one register. 45 instructions for AVX-512's 16 sums.
template <int SIDE, int... LANE>
static inline Vector sums_of_blocks(Vector a, Vector b, std::integer_sequence<int, LANE...>) {
  return __builtin_shufflevector(a, b, (LANE & SIDE ? LANES + LANE - SIDE : LANE)...) +
         __builtin_shufflevector(a, b, (LANE & SIDE ? LANES + LANE : LANE + SIDE)...);
}

template <int SIDE = LANES / 2>
static inline Vector horizontal_sums(Vector (&rows)[LANES]) {
  for (int i = 0; i < SIDE; i++) {
    rows[i] = sums_of_blocks<SIDE>(rows[i], rows[i + SIDE], std::make_integer_sequence<int, LANES>{});
  }
  if constexpr (SIDE > 1) return horizontal_sums<SIDE / 2>(rows);
  return rows[0];
}

}  // namespace trilby::TRILBY_LEVEL

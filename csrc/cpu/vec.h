// Vectors of the instruction set a file is compiled for (GCC and Clang vector extensions): loads and stores of every
// storage type as float or double, reductions, exp. Each shared object is one instruction set, so nothing is chosen here.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// For functions that take the body of a loop, and for that body (a lambda that captures by value): not inlined, its
// captures would be loaded again at each turn.
#define CONVBLOCKS_LOOP __attribute__((always_inline))

namespace convblocks::cpu {

#if defined(__AVX512F__)
inline constexpr int kBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kBytes = 32;
#else
inline constexpr int kBytes = 16;
#endif

using bf16 = c10::BFloat16;
using f16 = c10::Half;

// What a storage type is computed in.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

typedef float VecF __attribute__((vector_size(kBytes)));
typedef double VecD __attribute__((vector_size(kBytes)));
typedef int32_t VecI __attribute__((vector_size(kBytes)));
typedef uint32_t VecU __attribute__((vector_size(kBytes)));
typedef uint16_t VecH __attribute__((vector_size(kBytes / 2)));

template <class A>
using Vec = std::conditional_t<std::is_same_v<A, double>, VecD, VecF>;
template <class T>
inline constexpr int kLanes = kBytes / sizeof(Acc<T>);

template <class V>
using Lane = std::remove_cvref_t<decltype(std::declval<V>()[0])>;

template <class V>
inline V splat(Lane<V> a) {
  return a - V{};  // GCC broadcasts a scalar operand
}

// --- storage <-> vector -----------------------------------------------------------------------------------------------

inline VecF widen(VecH bits, bf16) { return (VecF)(__builtin_convertvector(bits, VecU) << 16); }

inline VecF widen(VecH bits, f16) {
#if defined(__AVX512F__)
  return (VecF)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
  return (VecF)_mm256_cvtph_ps((__m128i)bits);
#else
  VecF v;
  for (int i = 0; i < kLanes<f16>; i++) v[i] = static_cast<float>(f16(bits[i], f16::from_bits()));
  return v;
#endif
}

inline VecH narrow(VecF v, bf16) {  // to the nearest, ties to even; a NaN stays one
  const VecU u = (VecU)v;
  const VecU rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return __builtin_convertvector(v == v ? rounded : (u >> 16) | 0x40, VecH);
}

inline VecH narrow(VecF v, f16) {
#if defined(__AVX512F__)
  return (VecH)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (VecH)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  VecH bits;
  for (int i = 0; i < kLanes<f16>; i++) bits[i] = f16(v[i]).x;
  return bits;
#endif
}

template <class T>
inline Vec<Acc<T>> load(const T* p) {
  if constexpr (sizeof(T) == 2) {
    VecH bits;
    std::memcpy(&bits, p, sizeof(bits));
    return widen(bits, T{});
  } else {
    Vec<T> v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
}

template <class T>
inline void store(T* p, Vec<Acc<T>> v) {
  if constexpr (sizeof(T) == 2) {
    const VecH bits = narrow(v, T{});
    std::memcpy(p, &bits, sizeof(bits));
  } else {
    std::memcpy(p, &v, sizeof(v));
  }
}

// The first `count` lanes; the others are `fill` and nothing is read there.
template <class T>
inline Vec<Acc<T>> load(const T* p, int count, Acc<T> fill = 0) {
  using V = Vec<Acc<T>>;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    return (V)_mm512_mask_loadu_ps((__m512)splat<V>(fill), (1u << count) - 1, p);
  } else if constexpr (sizeof(T) == 2) {
    const auto mask = static_cast<__mmask16>((1u << count) - 1);
    const V v = widen((VecH)_mm256_maskz_loadu_epi16(mask, p), T{});
    return (V)_mm512_mask_mov_ps((__m512)splat<V>(fill), mask, (__m512)v);
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) {
    const VecI mask = VecI{0, 1, 2, 3, 4, 5, 6, 7} < count;
    const VecF v = (VecF)_mm256_maskload_ps(p, (__m256i)mask);
    return mask ? v : splat<VecF>(fill);
  }
#endif
  V v = splat<V>(fill);
  for (int i = 0; i < count; i++) v[i] = static_cast<Acc<T>>(p[i]);
  return v;
}

template <class T>
inline void store(T* p, Vec<Acc<T>> v, int count) {
#if defined(__AVX512F__)
  const auto mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (std::is_same_v<T, float>) return _mm512_mask_storeu_ps(p, mask, (__m512)v);
  if constexpr (sizeof(T) == 2) return _mm256_mask_storeu_epi16(p, mask, (__m256i)narrow(v, T{}));
#endif
  T lanes[kLanes<T>];
  store(lanes, v);
  const T* from = lanes;
#pragma GCC unroll 5
  for (int some = kLanes<T>; some; some /= 2) {
    if (!(count & some)) continue;
    std::memcpy(p, from, some * sizeof(T));
    p += some;
    from += some;
  }
}

// Past the caches, to an address aligned to the stored vector: nothing is read first, and nothing useful is pushed out.
template <class T>
inline void store_past_caches(T* p, Vec<Acc<T>> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2)
    _mm256_stream_si256((__m256i*)p, (__m256i)narrow(v, T{}));
  else
    _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 2)
    _mm_stream_si128((__m128i*)p, (__m128i)narrow(v, T{}));
  else
    _mm256_stream_si256((__m256i*)p, (__m256i)v);
#else
  store(p, v);
#endif
}

// Orders the stores past the caches before whatever tells another thread that they are done.
inline void finish_stores() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// a * b + c, rounded once where the processor can: compilers may do so in one copy of a loop and not in another.
#if defined(__AVX512F__)
inline VecF multiply_add(VecF a, VecF b, VecF c) { return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline VecD multiply_add(VecD a, VecD b, VecD c) { return (VecD)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
#elif defined(__AVX2__)
inline VecF multiply_add(VecF a, VecF b, VecF c) { return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline VecD multiply_add(VecD a, VecD b, VecD c) { return (VecD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
#else
template <class V>
inline V multiply_add(V a, V b, V c) {
  return a * b + c;
}
#endif

// --- lanes ------------------------------------------------------------------------------------------------------------

// f of halves, of quarters, and so on to single lanes.
template <int kHalf, class V, class F, int... I>
inline Lane<V> fold_lanes(V v, F f, std::integer_sequence<int, I...> all) {
  if constexpr (kHalf == 0) {
    return v[0];
  } else {
    return fold_lanes<kHalf / 2>(f(v, __builtin_shufflevector(v, v, (I ^ kHalf)...)), f, all);
  }
}
template <class V, class F>
inline Lane<V> fold_lanes(V v, F f) {
  constexpr int L = kBytes / sizeof(Lane<V>);
  return fold_lanes<L / 2>(v, f, std::make_integer_sequence<int, L>{});
}

template <class V>
inline Lane<V> sum_lanes(V v) {
  return fold_lanes(v, [](V a, V b) { return a + b; });
}

// Half of the lanes of what f makes of a's pairs of lanes, kBit apart, and of b's.
template <int kBit, class V, class F, int... I>
inline V fold_pairs(V a, V b, F f, std::integer_sequence<int, I...>) {
  constexpr int L = sizeof...(I);
  return f(__builtin_shufflevector(a, b, (I & kBit ? I + L : I)...),
           __builtin_shufflevector(a, b, (I & kBit ? I - kBit + L : I + kBit)...));
}

// Of as many vectors as one has lanes what f makes of their lanes: the lane l of the result is that of v[l].
template <int kBit = 1, class V, class F>
CONVBLOCKS_LOOP inline V fold_each(V* v, F f) {
  constexpr int L = kBytes / sizeof(Lane<V>);
  if constexpr (kBit == L) {
    return v[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < L / kBit; i += 2) {
      v[i / 2] = fold_pairs<kBit>(v[i], v[i + 1], f, std::make_integer_sequence<int, L>{});
    }
    return fold_each<2 * kBit>(v, f);
  }
}

template <class V>
CONVBLOCKS_LOOP inline V sum_each(V* v) {
  return fold_each(v, [](V a, V b) { return a + b; });
}

template <class V>
inline V max_or_nan(V a, V b) {  // a NaN on either side stays, as in torch.amax
  return (b > a) | (b != b) ? b : a;
}

template <class V>
inline Lane<V> max_lanes(V v) {
  return fold_lanes(v, [](V a, V b) { return max_or_nan(a, b); });
}

template <class V>
inline V max_each(V* v) {
  return fold_each(v, [](V a, V b) { return max_or_nan(a, b); });
}

// --- functions --------------------------------------------------------------------------------------------------------

template <class F>
inline VecD each_lane(VecD v, F f) {
  for (int i = 0; i < kBytes / 8; i++) v[i] = f(v[i]);
  return v;
}
template <class F>
inline VecF each_lane(VecF v, F f) {
  for (int i = 0; i < kBytes / 4; i++) v[i] = f(v[i]);
  return v;
}

inline VecD exp(VecD v) {
  return each_lane(v, [](double a) { return std::exp(a); });
}

// Within 1.5 ulp. Infinite from 88.4 on, where 2^n is; below -87 it stays at exp(-87). A NaN stays one.
inline VecF exp(VecF v) {
  v = v > 89.f ? splat<VecF>(89.f) : v;
  v = v < -87.f ? splat<VecF>(-87.f) : v;
  constexpr float magic = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const VecF shifted = v * 1.44269504088896341f + magic;
  const VecF n = shifted - magic;
  const VecF r = (v - n * 0.693359375f) - n * -2.12194440e-4f;
  VecF p = splat<VecF>(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  return p * (VecF)(((VecI)shifted + 127) << 23);
}

template <class V>
inline V sigmoid(V v) {
  return 1 / (1 + exp(-v));
}

// 2^v for v <= 0, within 2 ulp of the result and of v; 0 or nearly from -126 on. A NaN stays one.
inline VecD exp2_of_negative(VecD v) {
  return each_lane(v, [](double a) { return std::exp2(a); });
}
inline VecF exp2_of_negative(VecF v) {
#if defined(__AVX512F__)
  const VecF f = (VecF)_mm512_reduce_ps((__m512)v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // v - floor(v)
#else
  v = v < -126.f ? splat<VecF>(-126.f) : v;
#if defined(__AVX2__)
  const VecF n = (VecF)_mm256_floor_ps((__m256)v);
#else
  VecF n = __builtin_convertvector(__builtin_convertvector(v, VecI), VecF);
  n = n > v ? n - 1 : n;
#endif
  const VecF f = v - n;
#endif
  VecF p = splat<VecF>(1.87757676566e-3f);
  p = p * f + 8.9893398766e-3f;
  p = p * f + 5.58263182317e-2f;
  p = p * f + 2.40153616983e-1f;
  p = p * f + 6.93153073207e-1f;
  p = p * f + 9.99999925064e-1f;
#if defined(__AVX512F__)
  return (VecF)_mm512_scalef_ps((__m512)p, (__m512)v);
#else
  return p * (VecF)((__builtin_convertvector(n, VecI) + 127) << 23);
#endif
}

// 1 / v, within 2 ulp for a v that is neither tiny nor huge.
inline VecD reciprocal(VecD v) { return 1 / v; }
inline VecF reciprocal(VecF v) {
#if defined(__AVX512F__)
  const VecF guess = (VecF)_mm512_rcp14_ps((__m512)v);
  return guess + guess * (1 - v * guess);
#else
  return 1 / v;
#endif
}

}  // namespace convblocks::cpu

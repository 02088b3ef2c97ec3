// A 3x3, 5x5 or 7x7 depthwise convolution of stride 1 or 2 with pixels in the lanes, for planes of float in NCHW: nothing
// is rearranged. For processors whose vectors load under a mask.
#pragma once
#include "../depthwise_conv2d.h"
#include "depthwise_row.h"

namespace convblocks::cpu {

#if defined(__AVX2__)
#if defined(__AVX512F__)
using Mask = uint32_t;
#else
using Mask = VecI;
#endif

inline bool planes_fit(const DepthwiseConv2dShape& s, const Map& x, const Map& y) {
  const int64_t k = s.kernel_h;
#if defined(__AVX512F__)
  const bool filter = k == s.kernel_w && (k == 3 || ((k == 5 || k == 7) && s.out_w > 8));  // else measured to be slower
#else
  const bool few = (k == 3 || k == 5 || k == 7) && s.c * s.multiplier <= 2 && s.out_w > 16;
  const bool filter =
      k == s.kernel_w && (few || (k == 3 && s.stride_w == 1 && s.out_w > 8));  // else measured to be slower
#endif
  return filter && s.stride_h == s.stride_w && s.stride_h <= 2 && s.dilation_h == 1 && s.dilation_w == 1 &&
         x.pixel == 1 && y.pixel == 1;
}

// One that is not would make NaN of the zeros in lanes that are out of the map.
inline bool has_finite_weights(const DepthwiseConv2dShape& s, const float* weight) {
  const auto zeros = [=](int64_t i, auto lanes) CONVBLOCKS_LOOP { return Vecs<float, 1>{load(weight + i, lanes) * 0}; };
  return reduce_plane<float, 1>(s.c * s.multiplier * s.kernel_h * s.kernel_w, zeros)[0] == 0;
}

constexpr int64_t kNearPixels = 8192;  // of planes that the first cache serves, as measured

// Planes that are worked on later, fetched a little at every step of the work on others. Most are walked down their columns,
// which processors do not foresee; of none they foresee the next one.
class Ahead {
 public:
  void add(const float* plane, int64_t pixels) { planes_[count_++] = {plane, pixels, 0}, pixels_ += pixels; }
  void clear() { count_ = 0, pixels_ = 0; }
  void start(int64_t steps) {
    for (int i = 0; i < count_; i++)
      planes_[i].share = ((planes_[i].left + kLine - 1) / kLine + steps - 1) / steps * kLine;
  }
  // In place: of a function that does nothing else compilers leave out the call.
  CONVBLOCKS_LOOP void step() {
    for (int i = 0; i < count_; i++) {
      auto& [at, left, share] = planes_[i];
      for (int64_t p = 0; p < std::min(left, share); p += kLine)
        pixels_ <= kNearPixels ? __builtin_prefetch(at + p, 0, 3) : __builtin_prefetch(at + p, 0, 2);
      at += share, left -= share;
    }
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(float);
  struct Plane {
    const float* at;
    int64_t left, share;
  };
  Plane planes_[3];
  int count_ = 0;
  int64_t pixels_ = 0;
};

// P planes share a vector: where they are narrow, two of AVX-512. K is the size of the filter.
template <int P, int K>
struct Planes {
  static constexpr int kWidth = kLanes<float> / P, kRows = K == 3 ? 4 : 7;
  const float* in[P];
  float* out[P];
  const float* weight[P];
  float bias[P];
  int64_t h, w, out_h, out_w, top, left;
  // `later`: of a whole plane, while it is in a cache. Rows that end in a part of a vector would take longer.
  Activation activation = Activation::none, later = Activation::none;
  float* sums[P];          // of the results of each plane; or null
  Ahead* ahead = nullptr;  // where a vector is one plane's

#if defined(__AVX512F__)
  // The lanes from `begin` to `end` of so many.
  static Mask lanes(int64_t begin, int64_t end, int width) {
    begin = std::clamp<int64_t>(begin, 0, width);
    end = std::clamp<int64_t>(end, begin, width);
    return static_cast<uint32_t>((uint64_t{1} << end) - (uint64_t{1} << begin));
  }
  template <class F>
  static VecF both(F f) {
    if constexpr (P == 1) return splat<VecF>(f(0));
    return (VecF)_mm512_insertf32x8(_mm512_set1_ps(f(0)), _mm256_set1_ps(f(P - 1)), 1);
  }
  VecF load(int64_t offset, Mask mask) const {
    if constexpr (P == 1) return (VecF)_mm512_maskz_loadu_ps(mask, in[0] + offset);
    const __m512 low = _mm512_castps256_ps512(_mm256_maskz_loadu_ps(mask, in[0] + offset));
    return (VecF)_mm512_insertf32x8(low, _mm256_maskz_loadu_ps(mask, in[P - 1] + offset), 1);
  }
  // Of both planes, the lanes in the mask; zeros else.
  static VecF select(VecF v, Mask mask) {
    return (VecF)_mm512_maskz_mov_ps(P == 1 ? mask : mask | mask << kWidth, (__m512)v);
  }
  void store(int64_t offset, VecF v, Mask mask, int64_t) const {
    _mm512_mask_storeu_ps(out[0] + offset, mask, (__m512)v);
    // Not the upper half by itself: compilers make that an instruction that touches lanes out of the mask.
    if constexpr (P == 2) _mm512_mask_storeu_ps(out[1] + offset - kWidth, mask << kWidth, (__m512)v);
  }

#else
  static Mask lanes(int64_t begin, int64_t end, int width) {
    const VecI lane{0, 1, 2, 3, 4, 5, 6, 7};
    begin = std::clamp<int64_t>(begin, 0, width);
    end = std::clamp<int64_t>(end, begin, width);
    return (lane >= static_cast<int32_t>(begin)) & (lane < static_cast<int32_t>(end));
  }
  template <class F>
  static VecF both(F f) {
    return splat<VecF>(f(0));
  }
  VecF load(int64_t offset, Mask mask) const { return (VecF)_mm256_maskload_ps(in[0] + offset, (__m256i)mask); }
  static VecF select(VecF v, Mask mask) { return mask ? v : VecF{}; }
  // Not under the mask: such a store takes as long as ten others on some processors.
  void store(int64_t offset, VecF v, Mask, int64_t count) const {
    if (count >= kWidth) return cpu::store(out[0] + offset, v);
    cpu::store(out[0] + offset, v, static_cast<int>(count));
  }
#endif

  // Tap j of the window of column t meets column t * STRIDE + `column` + j of the map. Which of these are there, for each
  // load of met(): made once for all rows.
  using Masks = Mask[K + 1];
#if defined(__AVX512F__)
  // Loads that cross a line of the cache take twice as long: a row is loaded once, and shifted. Of each plane so many
  // columns, then a few more; or 0, where planes are narrow and each tap loads what it meets.
  template <int STRIDE>
  static constexpr int kSpan = (P == 1 || STRIDE == 2) * 16 * STRIDE / P;
#endif
  template <int STRIDE>
  CONVBLOCKS_LOOP void masks(int64_t column, Masks& mask) const {
    const auto inside = [&](int64_t first, int width) { return lanes(-first, w - first, width); };
    CONVBLOCKS_UNROLL
    for (int j = 0; j <= K; j++) {
#if defined(__AVX512F__)
      mask[j] = kSpan<STRIDE> ? inside(column + kSpan<STRIDE> * j, kSpan<STRIDE>) : inside(column + j, kWidth);
#else
      mask[j] = inside(column + (STRIDE == 2 && j % 2 ? j - 1 + kWidth : j), kWidth);  // odd: the second of two loads
#endif
    }
  }

  // What the taps of a row meet. `kWhole`: no lane is out of the map.
  template <int STRIDE, bool kWhole>
  CONVBLOCKS_LOOP void met(int64_t row, int64_t column, const Masks& mask, VecF (&x)[K]) const {
    const int64_t at = row * w + column;
#if !defined(__AVX512F__)
    const auto part = [&](int64_t j, int m)
                          CONVBLOCKS_LOOP { return kWhole ? cpu::load(in[0] + at + j) : load(at + j, mask[m]); };
    CONVBLOCKS_UNROLL
    for (int j = 0; j < K; j++) {
      if constexpr (STRIDE == 1) {
        x[j] = part(j, j);
      } else if (j % 2 == 0) {
        const VecF a = part(j, j), b = part(j + 8, j + 1);
        x[j] = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
        if (j + 1 < K) x[j + 1] = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
      }
    }
#else
    const auto columns = [&](int p, int64_t from, Mask m)
                             CONVBLOCKS_LOOP { return _mm512_maskz_loadu_ps(m, in[p] + at + from); };
    const auto after = [&](int p) CONVBLOCKS_LOOP {
      return _mm512_castps256_ps512(_mm256_maskz_loadu_ps(mask[1], in[p] + at + kSpan<STRIDE>));
    };
    // Which of the columns of two vectors tap j meets; P == 2: of the planes, one in each.
    const auto picked = [](int j) CONVBLOCKS_LOOP {
      const VecI lane{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      return (__m512i)(P == 1 ? lane * STRIDE + j : (lane & 7) * STRIDE + (lane >> 3) * 16 + j);
    };
    const auto each = [&](auto tap) CONVBLOCKS_LOOP {
      const auto all = [&]<int... j>(std::integer_sequence<int, j...>)
                           CONVBLOCKS_LOOP { ((x[j] = (VecF)tap(std::integral_constant<int, j>{})), ...); };
      all(std::make_integer_sequence<int, K>{});
    };
    if constexpr (P == 1 && STRIDE == 1) {
      const __m512i a = (__m512i)columns(0, 0, mask[0]), b = (__m512i)after(0);
      each([=]<int j>(std::integral_constant<int, j>) CONVBLOCKS_LOOP { return _mm512_alignr_epi32(b, a, j); });
    } else if constexpr (P == 1) {
      const __m512 a = columns(0, 0, mask[0]), b = columns(0, 16, mask[0] >> 16), c = after(0);
      // By value: the compiler would keep what is referred to in memory.
      const __m512 even = _mm512_permutex2var_ps(a, picked(0), b), odd = _mm512_permutex2var_ps(a, picked(1), b);
      const __m512 more_even = K == 3 ? c : _mm512_permutexvar_ps(picked(0), c);
      const __m512 more_odd = _mm512_permutexvar_ps(picked(1), c);
      each([=]<int j>(std::integral_constant<int, j>) CONVBLOCKS_LOOP {
        return _mm512_alignr_epi32((__m512i)(j % 2 ? more_odd : more_even), (__m512i)(j % 2 ? odd : even), j / 2);
      });
    } else if constexpr (STRIDE == 1) {
      CONVBLOCKS_UNROLL
      for (int j = 0; j < K; j++) x[j] = load(at + j, mask[j]);
    } else {
      const __m512 a = columns(0, 0, mask[0]), b = columns(P - 1, 0, mask[0]);
      const __m512 c = after(0), d = after(P - 1);
      each([=]<int j>(std::integral_constant<int, j>) {
        // Lanes whose column is past the first 16.
        constexpr __mmask16 past = j < 2 ? 0 : 0x0101 * (0xff & ~(0xff >> (j / 2)));
        const __m512 v = _mm512_permutex2var_ps(a, picked(j), b);
        return past ? _mm512_mask_mov_ps(v, past, _mm512_permutex2var_ps(c, picked(j - 16), d)) : v;
      });
    }
#endif
  }

  // The sum, too: of the zeros past the end these activations make zeros.
  __attribute__((noinline)) float activate_plane() const {
    return reduce_plane<float, 1>(out_h * out_w,
                                  [to = out[0], activation = later](int64_t i, auto lanes) CONVBLOCKS_LOOP {
                                    const VecF v = activate(cpu::load(to + i, lanes), activation);
                                    cpu::store(to + i, v, lanes);
                                    return Vecs<float, 1>{v};
                                  })[0];
  }

  template <int STRIDE>
  CONVBLOCKS_LOOP void convolve() const {
    VecF tap[K * K];
    CONVBLOCKS_UNROLL
    for (int t = 0; t < K * K; t++) tap[t] = both([&](int p) { return weight[p][t]; });
    const VecF start = both([&](int p) { return bias[p]; });
    VecF total{};
    int64_t begin = 0, end = out_h;
    if (P == 1 && ahead) ahead->start((out_w + kWidth - 1) / kWidth * ((out_h + kRows - 1) / kRows));
    const auto columns = [&]<bool kWhole>(int64_t column, std::bool_constant<kWhole>) CONVBLOCKS_LOOP {
      const Mask written = lanes(0, out_w - column, kWidth);
      Masks mask;
      masks<STRIDE>(column * STRIDE - left, mask);
      for (int64_t row = begin; row < end; row += kRows) {
        VecF acc[kRows];
        CONVBLOCKS_UNROLL
        for (int r = 0; r < kRows; r++) acc[r] = start;
        CONVBLOCKS_UNROLL
        for (int i = 0; i < (kRows - 1) * STRIDE + K; i++) {
          const int64_t in_row = row * STRIDE - top + i;
          if (static_cast<uint64_t>(in_row) >= static_cast<uint64_t>(h)) continue;
          VecF x[K];
          met<STRIDE, kWhole>(in_row, column * STRIDE - left, mask, x);
          CONVBLOCKS_UNROLL
          for (int r = 0; r < kRows; r++) {
            const int k = i - r * STRIDE;
            if (k < 0 || k >= K) continue;
            CONVBLOCKS_UNROLL
            for (int j = 0; j < K; j++) acc[r] += x[j] * tap[k * K + j];
          }
        }
        if (P == 1 && ahead) ahead->step();
        activate_tile(acc, activation);
        CONVBLOCKS_UNROLL
        for (int r = 0; r < kRows; r++) {
          if (row + r < out_h) store((row + r) * out_w + column, acc[r], written, out_w - column);
        }
        if (sums[0]) {
          VecF sum{};
          CONVBLOCKS_UNROLL
          for (int r = 0; r < kRows; r++) sum += row + r < out_h ? acc[r] : VecF{};
          total += select(sum, written);
        }
      }
    };
    // The masks of a column serve all rows of a band. Bands are for planes of which the first cache keeps too little until
    // the next column: with AVX-512, those of stride 2 (a vector passes twice as many columns).
#if defined(__AVX512F__)
    int64_t band = out_h;
    if (P == 1 && STRIDE == 2 && h * w > kNearPixels)
      band = std::max<int64_t>(kRows, kNearPixels / 2 / (w * STRIDE) / kRows * kRows);
    constexpr bool kAsks = false;
#else
    const int64_t band = out_w > 4 * kWidth ? kRows : out_h;
    constexpr bool kAsks = true;
#endif
    for (; begin < out_h; begin += band) {
      end = std::min(out_h, begin + band);
      for (int64_t column = 0; column < out_w; column += kWidth) {
        const int64_t first = column * STRIDE - left;
        const bool whole = kAsks && first >= 0 && first + (kWidth - 1) * STRIDE + K + STRIDE <= w;
        whole ? columns(column, std::true_type{}) : columns(column, std::false_type{});
      }
    }
    if (later != Activation::none) {
      const float sum = activate_plane();
      if (sums[0]) *sums[0] = sum;
      return;
    }
    if (!sums[0]) return;
    CONVBLOCKS_UNROLL
    for (int p = 0; p < P; p++) {
      float sum = 0;
      for (int t = 0; t < kWidth; t++) sum += total[p * kWidth + t];
      *sums[p] = sum;
    }
  }
};

template <class T>
__attribute__((noinline)) void write_plane(const float* from, T* to, int64_t pixels, Activation activation,
                                           bool past_caches) {
  write_row<T>(to, pixels, past_caches,
               [=](int64_t p, auto lanes) CONVBLOCKS_LOOP { return activate(load(from + p, lanes), activation); });
}

template <int P, int K>
void convolve_planes(const Context& context, const DepthwiseConv2dShape& s, const float* weight, const float* bias,
                     Activation activation, const Map& x, const Map& y, float* sums) {
  const int64_t planes = s.c * s.multiplier, groups = (planes + P - 1) / P, pixels = s.out_h * s.out_w;
  const int64_t grain = std::max<int64_t>(1, 4096 / (pixels * P));
  const int64_t bytes = s.n * s.c * s.h * s.w * sizeof(float);
  const bool far = kBytes == 64 && exceeds_caches(bytes);
  const bool fetch = P == 1 && leaves_second_caches(bytes + s.n * planes * pixels * sizeof(float), context.threads);
  // A plane is made in the first cache where it goes from there past the others, or an activation is done on the way.
  const bool apart = P == 1 && !sums && pixels <= kNearPixels && (far || takes_call(activation));
  parallel_for(context, s.n * groups, grain, [&](int64_t begin, int64_t end) {
    const Scratch<float> scratch(apart ? pixels : 1);
    Planes<P, K> group;
    Ahead ahead;
    if (fetch) group.ahead = &ahead;
    group.h = s.h, group.w = s.w, group.out_h = s.out_h, group.out_w = s.out_w, group.top = s.top, group.left = s.left;
    const bool later = P == 1 && takes_call(activation) && pixels <= 1 << 16;
    group.activation = later || apart ? Activation::none : activation;
    group.later = later && !apart ? activation : Activation::none;
    for (int64_t i = begin; i < end; i++) {
      const int64_t sample = i / groups;
      if (fetch) ahead.clear();
      CONVBLOCKS_UNROLL
      for (int p = 0; p < P; p++) {
        const int64_t plane = std::min(i % groups * P + p, planes - 1);  // an odd last one is computed twice
        const auto in = [&](int64_t of) {
          return static_cast<const float*>(x.data) + sample * x.batch + of / s.multiplier * x.channel;
        };
        group.in[p] = in(plane);
        group.out[p] = static_cast<float*>(y.data) + sample * y.batch + plane * y.channel;
        group.weight[p] = weight + plane * K * K;
        group.bias[p] = bias ? bias[plane] : 0;
        if (fetch && plane + P < planes) {
          ahead.add(in(plane + P), s.h * s.w);
          if (!apart) ahead.add(group.out[p] + P * y.channel, pixels);
        }
        group.sums[p] = sums ? sums + sample * planes + plane : nullptr;
      }
      float* const to = group.out[0];
      if (apart) group.out[0] = scratch.data();
      s.stride_w == 1 ? group.template convolve<1>() : group.template convolve<2>();
      if (apart) write_plane(scratch.data(), to, pixels, activation, far);
    }
    finish_stores();
  });
}

// Calls f with how many planes share a vector and with the size of the filter, as constants.
template <class F>
void with_planes(const DepthwiseConv2dShape& s, F f) {
  const std::integral_constant<int, 1> one;
  const std::integral_constant<int, 3> three;
#if defined(__AVX512F__)
  if (s.kernel_h == 3 && s.out_w <= Planes<2, 3>::kWidth) return f(std::integral_constant<int, 2>{}, three);
#endif
  if (s.kernel_h == 3) return f(one, three);
  if (s.kernel_h == 5) return f(one, std::integral_constant<int, 5>{});
  f(one, std::integral_constant<int, 7>{});
}

inline void convolve_planes(const Context& context, const DepthwiseConv2dShape& s, const float* weight,
                            const float* bias, Activation activation, const Map& x, const Map& y, float* sums) {
  with_planes(s, [&]<int P, int K>(std::integral_constant<int, P>, std::integral_constant<int, K>) {
    convolve_planes<P, K>(context, s, weight, bias, activation, x, y, sums);
  });
}
#else
inline bool planes_fit(const DepthwiseConv2dShape&, const Map&, const Map&) { return false; }
inline bool has_finite_weights(const DepthwiseConv2dShape&, const float*) { return false; }
inline void convolve_planes(const Context&, const DepthwiseConv2dShape&, const float*, const float*, Activation,
                            const Map&, const Map&, float*) {}
#endif

}  // namespace convblocks::cpu

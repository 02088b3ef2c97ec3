// A 3x3 depthwise convolution of stride 1 with pixels in the lanes, for planes of float in NCHW: nothing is rearranged.
// For processors whose vectors load and store under a mask.
#pragma once
#include "../depthwise_conv2d.h"
#include "depthwise_row.h"

namespace convblocks::cpu {

#if defined(__AVX512F__)
inline constexpr bool kHasPlanes = true;

// P planes share a vector: where they are narrow, two.
template <int P>
struct Planes {
  static constexpr int kWidth = 16 / P;
  const float* in[P];
  float* out[P];
  const float* weight[P];  // nine taps
  float bias[P];
  int64_t h, w, out_h, out_w, top, left;
  Activation activation;

  void size(const DepthwiseConv2dShape& s, Activation a) {
    h = s.h, w = s.w, out_h = s.out_h, out_w = s.out_w, top = s.top, left = s.left, activation = a;
  }

  // The lanes of each plane from `begin` to `end`.
  static uint32_t lanes(int64_t begin, int64_t end) {
    begin = std::clamp<int64_t>(begin, 0, kWidth);
    end = std::clamp<int64_t>(end, begin, kWidth);
    return ((1u << end) - 1) & ~((1u << begin) - 1);
  }
  template <class F>
  static VecF both(F f) {
    if constexpr (P == 1) return splat<VecF>(f(0));
    return (VecF)_mm512_insertf32x8(_mm512_set1_ps(f(0)), _mm256_set1_ps(f(P - 1)), 1);
  }
  VecF load(int64_t offset, uint32_t mask) const {
    if constexpr (P == 1) return (VecF)_mm512_maskz_loadu_ps(mask, in[0] + offset);
    const __m512 low = _mm512_castps256_ps512(_mm256_maskz_loadu_ps(mask, in[0] + offset));
    return (VecF)_mm512_insertf32x8(low, _mm256_maskz_loadu_ps(mask, in[P - 1] + offset), 1);
  }
  void store(int64_t offset, VecF v, uint32_t mask) const {
    if constexpr (P == 1) {
      _mm512_mask_storeu_ps(out[0] + offset, mask, (__m512)v);
    } else {
      _mm256_mask_storeu_ps(out[0] + offset, mask, _mm512_castps512_ps256((__m512)v));
      _mm256_mask_storeu_ps(out[P - 1] + offset, mask, _mm512_extractf32x8_ps((__m512)v, 1));
    }
  }

  void convolve() const {
    constexpr int kRows = 4;
    VecF tap[9];
    CONVBLOCKS_UNROLL
    for (int t = 0; t < 9; t++) tap[t] = both([&](int p) { return weight[p][t]; });
    const VecF start = both([&](int p) { return bias[p]; });
    for (int64_t column = 0; column < out_w; column += kWidth) {
      uint32_t inside[3];
      for (int j = 0; j < 3; j++) inside[j] = lanes(left - column - j, w + left - column - j);
      const uint32_t written = lanes(0, out_w - column);
      for (int64_t row = 0; row < out_h; row += kRows) {
        VecF acc[kRows];
        CONVBLOCKS_UNROLL
        for (int r = 0; r < kRows; r++) acc[r] = start;
        CONVBLOCKS_UNROLL
        for (int i = 0; i < kRows + 2; i++) {
          const int64_t in_row = row - top + i;
          if (static_cast<uint64_t>(in_row) >= static_cast<uint64_t>(h)) continue;
          CONVBLOCKS_UNROLL
          for (int j = 0; j < 3; j++) {
            const VecF x = load(in_row * w + column - left + j, inside[j]);
            CONVBLOCKS_UNROLL
            for (int r = 0; r < kRows; r++) {
              if (i >= r && i < r + 3) acc[r] += x * tap[(i - r) * 3 + j];
            }
          }
        }
        activate_tile(acc, activation);
        CONVBLOCKS_UNROLL
        for (int r = 0; r < kRows; r++) {
          if (row + r < out_h) store((row + r) * out_w + column, acc[r], written);
        }
      }
    }
  }
};
#else
inline constexpr bool kHasPlanes = false;
#endif

}  // namespace convblocks::cpu

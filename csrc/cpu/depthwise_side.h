// Which positions along one side of a map the window of a convolution meets.
#pragma once
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>

namespace convblocks::cpu {

// Positions along one side: those that a window meets, and those whose windows meet a position.
struct Side {
  int64_t in, out, kernel, stride, dilation, padding;

  // The taps of the window at `out_position` that lie inside: from `tap` on, of which the first meets `position`.
  struct Window {
    int64_t tap, position, count;
  };
  Window window(int64_t out_position) const {
    const int64_t start = out_position * stride - padding;
    const int64_t tap = start < 0 ? (-start + dilation - 1) / dilation : 0;
    const int64_t end = start < in ? std::min(kernel, (in - start - 1) / dilation + 1) : 0;
    return {tap, start + tap * dilation, std::max<int64_t>(0, end - tap)};
  }

  // The taps through which `in_position` goes into results: tap, tap + tap_step, ... and the positions of these results,
  // each `step` below the one before; not all of them need be there.
  struct Reach {
    int64_t tap, tap_step, position, step, count;
  };
  Reach reach(int64_t in_position) const {
    const int64_t common = std::gcd(stride, dilation), at = in_position + padding;
    for (int64_t tap = 0; tap < std::min(kernel, stride / common); tap++) {
      if ((at - tap * dilation) % stride) continue;
      const int64_t tap_step = stride / common;
      return {tap, tap_step, (at - tap * dilation) / stride, dilation / common, (kernel - 1 - tap) / tap_step + 1};
    }
    return {0, 1, 0, 1, 0};
  }
  // Without the results that are not there.
  Reach reach_inside(int64_t in_position) const {
    Reach r = reach(in_position);
    const int64_t beyond = r.position >= out ? (r.position - out) / r.step + 1 : 0;
    const int64_t end = r.position < 0 ? 0 : std::min(r.count, r.position / r.step + 1);
    r.count = std::max<int64_t>(0, end - beyond);
    r.tap += beyond * r.tap_step;
    r.position -= beyond * r.step;
    return r;
  }

  // The positions [first, second) that the windows at [begin, end) meet, and the other way.
  std::pair<int64_t, int64_t> met_by(int64_t begin, int64_t end) const {
    return {std::clamp<int64_t>(begin * stride - padding, 0, in),
            std::clamp<int64_t>((end - 1) * stride - padding + (kernel - 1) * dilation + 1, 0, in)};
  }
  std::pair<int64_t, int64_t> reached_by(int64_t begin, int64_t end) const {
    const int64_t low = begin + padding - (kernel - 1) * dilation;
    return {std::clamp<int64_t>(low > 0 ? (low + stride - 1) / stride : 0, 0, out),
            std::clamp<int64_t>((end - 1 + padding) / stride + 1, 0, out)};
  }
};

}  // namespace convblocks::cpu

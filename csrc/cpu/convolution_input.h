// Lines of the input of a dense convolution, copied: out of planes, or with their padding, or both.
#pragma once
#include <algorithm>

#include "../dense_conv2d.h"
#include "convolution_tile.h"
#include "lanes.h"
#include "team.h"

namespace convblocks::cpu {

template <class A>
class ConvolutionInput {
 public:
  explicit ConvolutionInput(const DenseConv2dArgs& args) : a(args) {}

  bool exchanges() const { return a.planes && a.x.channel != 1; }  // planes with channels

  // The lines of a sample that lines [first, last] of the output are made of, `width` pixels of the padded input each.
  const A* padded(int64_t width, int64_t sample, int64_t first, int64_t last) {
    const int64_t top = first * a.stride_h - a.top, lines = (last - first) * a.stride_h + reach(),
                  kept = std::clamp<int64_t>(width - a.left, 0, a.w);
    A* to = room((lines * width + kLine) * a.c);  // kLine: what the last of a line may read, for nothing
    const auto skip = [&](int64_t pixels) { to = std::fill_n(to, pixels * a.c, A(0)); };
    for (int64_t h = top; h < top + lines; h++) {
      if (h < 0 || h >= a.h || kept == 0) {
        skip(width);
        continue;
      }
      skip(a.left);
      const A* const from = row<const A>(a.x, sample, 0, h * a.w);
      if (exchanges()) {
        transpose_into(from, a.x.channel, a.c, kept, to, a.c);
        to += kept * a.c;
      } else if (a.x.pixel == a.c) {
        to = std::copy_n(from, kept * a.c, to);
      } else {
        for (int64_t w = 0; w < kept; w++, to += a.c) {
          for_lanes<A>(a.c, [to, from = from + w * a.x.pixel](int64_t i, auto lanes)
                                CONVBLOCKS_LOOP { store(to + i, load(from + i, lanes), lanes); });
        }
      }
      skip(width - a.left - kept);
    }
    return data_.data();
  }

  // The same lines out of planes and without padding.
  const A* exchanged(int64_t sample, int64_t first, int64_t last) {
    const int64_t begin = first_exchanged(first) * a.w, end = inside(last * a.stride_h - a.top + reach()) * a.w;
    A* const to = room((end - begin) * a.c);
    transpose_into(row<const A>(a.x, sample, 0, begin), a.x.channel, a.c, end - begin, to, a.c);
    return to;
  }
  int64_t first_exchanged(int64_t first) const { return inside(first * a.stride_h - a.top); }

 private:
  int64_t inside(int64_t line) const { return std::clamp<int64_t>(line, 0, a.h); }
  int64_t reach() const { return (a.kernel_h - 1) * a.dilation_h + 1; }

  A* room(int64_t size) {
    if (size > data_.size()) data_ = Buffer<A>(size);
    return data_.data();
  }

  const DenseConv2dArgs& a;
  Buffer<A> data_;
};

}  // namespace convblocks::cpu

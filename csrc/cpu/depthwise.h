// What the two directions of a depthwise convolution on the CPU share: channels in the lanes of vectors, in both layouts. A
// map in channels_last is used where it lies; of one in NCHW, or with few channels, the planes of a vector's channels are
// gathered into scratch memory, a band of rows at a time, and what becomes of them is scattered back.
#pragma once
#include "../depthwise_conv2d.h"
#include "depthwise_row.h"
#include "depthwise_side.h"
#include "lanes.h"
#include "weights.h"

namespace convblocks::cpu {

constexpr int64_t kBandBytes = 256 << 10;  // of scratch memory for a band of rows
constexpr int64_t kChunk = 1024;  // pixels whose products or results are summed before they are added to others

template <class T>
struct Depthwise {
  using A = Acc<T>;
  static constexpr int L = kLanes<T>;

  const Context& context;
  const DepthwiseConv2dShape& shape;
  const A *weight, *bias;
  Activation activation;
  Side rows, columns;
  int64_t taps, block;  // elements of a block of packed weights, and of sums: the taps and one more, each a vector

  Depthwise(const Context& context, const DepthwiseConv2dShape& s, const DepthwiseConv2dWeights& w)
      : context(context), shape(s),
        weight(widened<A>(context, w.weight, w.dtype, s.c * s.multiplier * s.kernel_h * s.kernel_w)),
        bias(widened<A>(context, w.bias, w.dtype, s.c * s.multiplier)), activation(w.activation),
        rows{s.h, s.out_h, s.kernel_h, s.stride_h, s.dilation_h, s.top},
        columns{s.w, s.out_w, s.kernel_w, s.stride_w, s.dilation_w, s.left}, taps(s.kernel_h * s.kernel_w),
        block((taps + 1) * L) {}

  // The weights and the bias of `count` channels, `multiplier` apart: the taps in turn, then the bias.
  void pack(int64_t channel, int count, A* to) const {
    const int64_t m = shape.multiplier;
    gather_lanes<A>({weight + channel * taps, m * taps, 1, count}, 0, taps, to);
    if (bias)
      gather_lanes<A>({bias + channel, m, 0, count}, 0, 1, to + taps * L);
    else
      store(to + taps * L, Vec<A>{});
  }

  // A row of the result. Row `in_first` of the map lies at `in`, whose rows are whole.
  template <class S, class D>
  Row<S, D> forward_row(int64_t row, const S* in, int64_t in_first, int64_t in_pixel, const A* packed, D* out,
                        int64_t out_pixel) const {
    const auto window = rows.window(row);
    const int64_t in_row = shape.w * in_pixel;
    return {in + (window.position - in_first) * in_row,
            shape.dilation_h * in_row,
            in_pixel,
            packed + window.tap * shape.kernel_w * L,
            shape.kernel_w * L,
            L,
            block,
            packed + taps * L,
            block,
            window.count,
            shape.kernel_w,
            -shape.left,
            shape.stride_w,
            shape.dilation_w,
            shape.w,
            out,
            out_pixel,
            shape.out_w,
            false,
            activation};
  }

  // Whether so many maps as large as x, and one as large as the result, leave little of each other in the nearer caches.
  bool fetches(int64_t maps) const {
    const int64_t pixels = maps * shape.h * shape.w + shape.multiplier * shape.out_h * shape.out_w;
    return leaves_second_caches(shape.n * shape.c * pixels * sizeof(T), context.threads);
  }
  // Of the rows that a window meets, those that the one above did not.
  Fetch new_rows(int64_t met, bool out) const { return {out, std::max<int64_t>(0, met - shape.stride_h), met}; }

  // --- in channels_last: the channels of `part` of `parts`, in whole vectors, of which the last may overlap another ---

  bool in_place(std::initializer_list<Map> maps) const {
    bool dense = shape.multiplier == 1 && shape.c >= L;
    for (const Map& map : maps) dense &= map.channel == 1;
    return dense;
  }
  struct Part {
    int64_t first_block, blocks, channel, channels;
  };
  Part part(int64_t index, int64_t parts) const {
    const int64_t all = (shape.c + L - 1) / L, begin = all * index / parts, end = all * (index + 1) / parts;
    const int64_t stop = std::min(shape.c, end * L), channel = std::min(begin * L, shape.c - L);
    return {begin, end - begin, channel, stop - channel};
  }
  void pack(const Part& p, A* to) const {
    for (int64_t b = 0; b < p.blocks; b++) pack(p.channel + std::min(b * L, p.channels - L), L, to + b * block);
  }
  // No two parts have a channel in common: a last block that is a part of a vector is not one alone.
  int64_t parts(int64_t most) const { return std::clamp<int64_t>(most, 1, std::max<int64_t>(1, shape.c / L)); }
  // Calls f(part, its packed weights, memory, item) for all parts of all items, item by item: if threads shared the channels
  // of many pixels, each would fetch what the other writes. The memory holds a vector of each block, and `more`.
  template <class F>
  void for_each_part(int64_t items, int64_t parts, int64_t grain, int64_t more, F f) const {
    parallel_for(context, items * parts, grain, [&](int64_t begin, int64_t end) {
      const Scratch<A> scratch(groups() * (block + L) + more);
      A* const memory = scratch.data() + groups() * block;
      for (int64_t i = begin; i < end; i++) {
        const Part p = part(i % parts, parts);
        A* const packed = scratch.data() + p.first_block * block;
        if (i - begin < parts) pack(p, packed);
        f(p, packed, memory, i / parts);
      }
    });
  }

  // --- otherwise: groups of L channels, each in scratch memory, a band of rows at a time ------------------------------

  int64_t groups() const { return (shape.c + L - 1) / L; }
  int lanes(int64_t group) const { return static_cast<int>(std::min<int64_t>(L, shape.c - group * L)); }
  template <class E>
  LaneMap<E> lanes_of(const Map& map, int64_t sample, int64_t group) const {
    return {static_cast<E*>(map.data) + sample * map.batch + group * L * map.channel, map.channel, map.pixel,
            lanes(group)};
  }
  // Channel j of those that each of the group's channels becomes.
  template <class E>
  LaneMap<E> results_of(const Map& map, int64_t sample, int64_t group, int64_t j) const {
    const int64_t m = shape.multiplier;
    return {static_cast<E*>(map.data) + sample * map.batch + (group * L * m + j) * map.channel, m * map.channel,
            map.pixel, lanes(group)};
  }
  // How many bands the rows are cut into, for so many elements of scratch memory for each row.
  static int64_t bands(int64_t rows, int64_t row_elements) {
    const int64_t band = std::max<int64_t>(4, kBandBytes / (row_elements * static_cast<int64_t>(sizeof(A))));
    return (rows + band - 1) / band;
  }

  // The first channel of a block of sums, and how many it has, each `multiplier` from the last.
  std::pair<int64_t, int> channels_of(int64_t b, bool overlap) const {
    const int64_t m = shape.multiplier;
    if (overlap) return {std::min(b * L, shape.c - L), L};
    return {b / m * L * m + b % m, lanes(b / m)};
  }
};

// Their names, in a struct that is derived from Depthwise<T>.
#define CONVBLOCKS_DEPTHWISE(T)                                                                                   \
  using Base = Depthwise<T>;                                                                                      \
  using Base::Base, Base::L, Base::context, Base::shape, Base::activation, Base::rows, Base::columns, Base::taps, \
      Base::block, Base::weight, Base::bias, Base::pack, Base::forward_row, Base::in_place, Base::for_each_part,  \
      Base::parts, Base::groups, Base::lanes, Base::lanes_of, Base::results_of, Base::bands, Base::channels_of,   \
      Base::fetches, Base::new_rows;                                                                              \
  using A = Base::A;                                                                                              \
  using Part = Base::Part;

}  // namespace convblocks::cpu

// A map times its gates, of channels and pixels: one read and one write.
#pragma once
#include "../apply_gates.h"
#include "weights.h"

namespace convblocks::cpu {

template <class A>
struct Widened {
  const A *channel, *spatial;  // null where there is none
  A more;                      // 1 with the residual
  Widened(const Context& context, const Gates& g, int64_t n, int64_t c, int64_t hw)
      : channel(widened<A>(context, g.channel, g.dtype, n * c)),
        spatial(widened<A>(context, g.spatial, g.dtype, n * hw)), more(g.residual ? 1 : 0) {}
};

template <class A, class L>
CONVBLOCKS_LOOP inline Vec<A> load_or_one(const A* p, int64_t i, L lanes) {
  return p ? load(p + i, lanes) : splat<Vec<A>>(1);
}

// `far`: the result will not be in a cache when it is read next.
template <class T>
void gate_map(const Context& context, const ApplyGatesArgs& a, bool far) {
  using A = Acc<T>;
  const Widened<A> gates(context, a.gates, a.n, a.c, a.hw);
  if (a.x.pixel == 1) {
    parallel_for(context, a.n * a.c, std::max<int64_t>(1, 16384 / a.hw), [&](int64_t begin, int64_t end) {
      int64_t sample = begin / a.c, c = begin % a.c;  // divisions take as long as half a short plane
      for (int64_t plane = begin; plane < end; plane++, c++) {
        if (c == a.c) sample++, c = 0;
        const T* x = row<T>(a.x, sample, c);
        const A gate = gates.channel ? gates.channel[plane] : A(1), more = gates.more;
        const A* spatial = gates.spatial ? gates.spatial + sample * a.hw : nullptr;
        write_row<T>(row<T>(a.y, sample, c), a.hw, far, [=](int64_t i, auto lanes) CONVBLOCKS_LOOP {
          return load(x + i, lanes) * (load_or_one(spatial, i, lanes) * gate + more);
        });
      }
      finish_stores();
    });
    return;
  }
  parallel_for(context, a.n * a.hw, std::max<int64_t>(1, 16384 / a.c), [&](int64_t begin, int64_t end) {
    for (int64_t pixel = begin; pixel < end; pixel++) {
      const int64_t sample = pixel / a.hw;
      const T* x = row<T>(a.x, sample, 0, pixel % a.hw);
      const A gate = gates.spatial ? gates.spatial[pixel] : A(1), more = gates.more;
      const A* channel = gates.channel ? gates.channel + sample * a.c : nullptr;
      write_row<T>(row<T>(a.y, sample, 0, pixel % a.hw), a.c, far, [=](int64_t i, auto lanes) CONVBLOCKS_LOOP {
        return load(x + i, lanes) * (load_or_one(channel, i, lanes) * gate + more);
      });
    }
    finish_stores();
  });
}

}  // namespace convblocks::cpu

// Gates of channels and pixels on the CPU: one read and one write; the gradients of the gates come from the same pass that
// writes that of the map.
#include "dispatch.h"
#include "gate_map.h"
#include "pixel_gate.h"

namespace convblocks::cpu {
namespace {

// A pass over a tile: `along` are the gates of the elements side by side in memory, `across` those of the G rows.
// Adds the sums of the rows to `row_sums`, vectors of them, and what each element sums to over the rows to `sums`.
template <class T, int G>
CONVBLOCKS_LOOP inline void backward_rows(int64_t n, const T* const (&grad)[G], const T* const (&x)[G],
                                          T* const (&to)[G], const Acc<T> (&across)[G], const Acc<T>* along,
                                          Acc<T> more, Acc<T>* sums, bool first, Vec<Acc<T>> (&row_sums)[G]) {
  using A = Acc<T>;
  for_lanes<T>(n, [&](int64_t i, auto lanes) CONVBLOCKS_LOOP {
    const Vec<A> gate = load_or_one(along, i, lanes);
    Vec<A> sum = first ? Vec<A>{} : load(sums + i, lanes);
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      const Vec<A> d = load(grad[g] + i, lanes), product = d * load(x[g] + i, lanes);
      store(to[g] + i, d * (gate * across[g] + more), lanes);
      sum += product * across[g];
      row_sums[g] += product * gate;
    }
    store(sums + i, sum, lanes);
  });
}

template <class T>
void backward(const Context& context, const ApplyGatesBackwardArgs& a) {
  using A = Acc<T>;
  const int64_t c = a.c, hw = a.hw;
  const Widened<A> gates(context, a.gates, a.n, c, hw);
  const bool planes = a.x.pixel == 1;
  const Tiles tiles(c, hw, planes);
  const int64_t size = tiles.blocks * c + tiles.chunks * hw;
  A* workspace = static_cast<A*>(context.workspace(context, a.n * size * sizeof(A)));
  const Narrowed<A> grad_channel(context, a.grad_channel, a.gates.dtype, a.n * c),
      grad_spatial(context, a.grad_spatial, a.gates.dtype, a.n * hw);
  for_each_sample(context, a.n, 2 * c * hw, [&](int64_t sample, const Team& team) {
    A *by_channel = workspace + sample * size, *by_pixel = by_channel + tiles.blocks * c;
    const A* channel = gates.channel ? gates.channel + sample * c : nullptr;
    const A* spatial = gates.spatial ? gates.spatial + sample * hw : nullptr;
    const A more = gates.more;
    tiles.each(team, [=, &a](const Tile& t) {
      A *of_channels = by_channel + t.block * c + t.first_channel, *of_pixels = by_pixel + t.chunk * hw + t.first_pixel;
      const auto rows = [&]<int G>(int64_t first, std::integral_constant<int, G>) {
        const T *grad[G], *x[G];
        T* to[G];
        A across[G];
        Vec<A> row_sums[G]{};
        for (int g = 0; g < G; g++) {
          const int64_t i = t.first_channel + (planes ? first + g : 0), p = t.first_pixel + (planes ? 0 : first + g);
          grad[g] = row<T>(a.grad, sample, i, p);
          x[g] = row<T>(a.x, sample, i, p);
          to[g] = row<T>(a.grad_x, sample, i, p);
          across[g] = planes ? (channel ? channel[i] : A(1)) : (spatial ? spatial[p] : A(1));
        }
        const A* along = planes ? spatial + (spatial ? t.first_pixel : 0) : channel + (channel ? t.first_channel : 0);
        backward_rows<T, G>(planes ? t.pixels : t.channels, grad, x, to, across, along, more,
                            planes ? of_pixels : of_channels, first == 0, row_sums);
        for (int g = 0; g < G; g++) (planes ? of_channels : of_pixels)[first + g] = sum_lanes(row_sums[g]);
      };
      by_four(planes ? t.channels : t.pixels, rows);
    });
    if (a.grad_channel) add_parts(by_channel, tiles.blocks, c, grad_channel + sample * c);
    if (a.grad_spatial) add_parts(by_pixel, tiles.chunks, hw, grad_spatial + sample * hw);
  });
}

}  // namespace
}  // namespace convblocks::cpu

const char* convblocks_apply_gates(const convblocks::Context& context, const convblocks::ApplyGatesArgs& args) {
  return convblocks::cpu::dispatch(args.dtype, [&]<class T>(T) {
    convblocks::cpu::gate_map<T>(context, args, convblocks::cpu::exceeds_caches(args.n * args.c * args.hw * sizeof(T)));
  });
}

const char* convblocks_apply_gates_backward(const convblocks::Context& context,
                                            const convblocks::ApplyGatesBackwardArgs& args) {
  return convblocks::cpu::dispatch(args.dtype, [&]<class T>(T) { convblocks::cpu::backward<T>(context, args); });
}

// Mean and maximum over the channels on the CPU. Planes are read in tiles, all channels of a stretch of pixels; of
// channels_last, as many pixels as a vector has lanes at a time.
#include "../channel_pool.h"

#include "dispatch.h"
#include "lanes.h"
#include "pixel_gate.h"
#include "weights.h"

namespace convblocks::cpu {
namespace {

template <class A>
constexpr A kLowest = -std::numeric_limits<A>::infinity();

template <class V>
CONVBLOCKS_LOOP inline V count_of(V values, V most) {
  return values == most ? splat<V>(1) : V{};
}

// --- a tile of planes -------------------------------------------------------------------------------------------------

// Of each pixel, over the tile's channels: the sum, the maximum, and how many have it; `sum` or `ties` may not be asked for.
template <class T, bool kSum, bool kTies>
void pool_planes(const Map& x, int64_t sample, const Acc<T>* gates, const Tile& t, Acc<T>* sum, Acc<T>* max,
                 Acc<T>* ties) {
  using A = Acc<T>;
  by_four(t.channels, [&]<int G>(int64_t first, std::integral_constant<int, G>) {
    const int64_t i = t.first_channel + first;
    const T* const plane = row<T>(x, sample, i, t.first_pixel);
    std::array<A, G> gate;
    for (int g = 0; g < G; g++) gate[g] = gates ? gates[i + g] : A(1);
    for_lanes<T>(t.pixels, [=](int64_t p, auto lanes) CONVBLOCKS_LOOP {
      const Vec<A> before = first ? load(max + p, lanes) : splat<Vec<A>>(kLowest<A>);
      std::array<Vec<A>, G> v;
      Vec<A> most = before, total{};
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) {
        v[g] = load(plane + g * x.channel + p, lanes) * gate[g];
        if constexpr (kSum) total += v[g];
        most = max_or_nan(most, v[g]);
      }
      if constexpr (kSum) store(sum + p, first ? load(sum + p, lanes) + total : total, lanes);
      store(max + p, most, lanes);
      if constexpr (kTies) {
        Vec<A> tied = first ? load(ties + p, lanes) : Vec<A>{};
        tied = most > before ? Vec<A>{} : tied;
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) tied += count_of(v[g], most);
        store(ties + p, tied, lanes);
      }
    });
  });
}

// Of pixels [i, i + lanes), from the maxima of all chunks of channels and how many have each.
template <class A, class L>
CONVBLOCKS_LOOP inline std::pair<Vec<A>, Vec<A>> merge(const A* max, const A* ties, int64_t chunks, int64_t hw,
                                                       int64_t i, L lanes) {
  Vec<A> most = splat<Vec<A>>(kLowest<A>), tied{};
  for (int64_t at = i; at < chunks * hw; at += hw) most = max_or_nan(most, load(max + at, lanes));
  for (int64_t at = i; ties && at < chunks * hw; at += hw)
    tied += load(max + at, lanes) == most ? load(ties + at, lanes) : Vec<A>{};
  return {most, tied};
}

// --- pixels of channels_last ------------------------------------------------------------------------------------------

// A number for each of up to a vector of pixels from one vector for each: the sum of its lanes, or the largest.
template <class A, class F>
Vec<A> fold(Vec<A>* v, F f) {
  transpose<A>(v);
  Vec<A> all = v[0];
  for (int l = 1; l < kLanes<A>; l++) all = f(all, v[l]);
  return all;
}

template <class T>
struct Pixels {
  using A = Acc<T>;
  static constexpr int L = kLanes<A>;
  const T* x;
  const A* gates;
  int64_t stride, c;
  int count;

  // Calls f(first, std::integral_constant<int, G>, gate) for groups of pixels, whose loads of the gates are shared:
  // gate(i, lanes) are those of the channels from i on.
  template <class F>
  CONVBLOCKS_LOOP void each_group(F f) const {
    const auto all = [&](auto gate) CONVBLOCKS_LOOP {
      constexpr int G = std::min(4, L);
      int first = 0;
      for (; first + G <= count; first += G) f(first, std::integral_constant<int, G>{}, gate);
      for (; first < count; first++) f(first, std::integral_constant<int, 1>{}, gate);
    };
    if (gates)
      all([gates = gates](int64_t i, auto lanes) CONVBLOCKS_LOOP { return load(gates + i, lanes, A(1)); });
    else
      all([](int64_t, auto) CONVBLOCKS_LOOP { return splat<Vec<A>>(1); });
  }

  struct Pooled {
    Vec<A> sum, max;
  };
  Pooled pool() const {
    Vec<A> sums[L]{}, most[L]{};
    each_group([&]<int G>(int64_t first, std::integral_constant<int, G>, auto gate) CONVBLOCKS_LOOP {
      const T* const from = x + first * stride;
      std::array<Vec<A>, G> sum{}, max;
      max.fill(splat<Vec<A>>(kLowest<A>));
      for_lanes<T>(c, [&, from, stride = stride](int64_t i, auto lanes) CONVBLOCKS_LOOP {
        const Vec<A> own = gate(i, lanes);
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) {
          const T* const at = from + g * stride + i;
          sum[g] += load(at, lanes) * own;
          max[g] = max_or_nan(max[g], load(at, lanes, kLowest<A>) * own);
        }
      });
      for (int g = 0; g < G; g++) {
        sums[first + g] = sum[g];
        most[first + g] = max[g];
      }
    });
    return {fold<A>(sums, [](auto a, auto b) { return a + b; }),
            fold<A>(most, [](auto a, auto b) { return max_or_nan(a, b); })};
  }
  Vec<A> ties(Vec<A> max) const {
    Vec<A> counts[L]{};
    each_group([&]<int G>(int64_t first, std::integral_constant<int, G>, auto gate) CONVBLOCKS_LOOP {
      const T* const from = x + first * stride;
      std::array<Vec<A>, G> n{}, most;
      for (int g = 0; g < G; g++) most[g] = splat<Vec<A>>(max[first + g]);
      for_lanes<T>(c, [&, from, stride = stride](int64_t i, auto lanes) CONVBLOCKS_LOOP {
        const Vec<A> own = gate(i, lanes);
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) {
          n[g] += count_of(load(from + g * stride + i, lanes, std::numeric_limits<A>::quiet_NaN()) * own, most[g]);
        }
      });
      for (int g = 0; g < G; g++) counts[first + g] = n[g];
    });
    return fold<A>(counts, [](auto a, auto b) { return a + b; });
  }
};

template <class T, class F>
void each_pixels(const Map& x, int64_t sample, const Acc<T>* gates, const Tile& t, F f) {
  constexpr int L = kLanes<T>;
  for (int64_t p = t.first_pixel; p < t.first_pixel + t.pixels; p += L) {
    const int count = static_cast<int>(std::min<int64_t>(L, t.first_pixel + t.pixels - p));
    f(p, Pixels<T>{row<T>(x, sample, 0, p), gates, x.pixel, t.channels, count});
  }
}

// --- the operation ----------------------------------------------------------------------------------------------------

template <class T>
void forward(const Context& context, const ChannelPoolArgs& a) {
  using A = Acc<T>;
  const int64_t c = a.c, hw = a.hw;
  const A* all_gates = widened<A>(context, a.channel, a.gate_dtype, a.n * c);
  const Tiles tiles(c, hw, a.x.pixel == 1);
  A* const memory = static_cast<A*>(a.memory);
  const int64_t size = (memory ? 3 : 2) * tiles.chunks * hw;
  A* workspace = static_cast<A*>(context.workspace(context, a.n * size * sizeof(A)));
  for_each_sample(context, a.n, c * hw, [&](int64_t sample, const Team& team) {
    A *sum = workspace + sample * size, *max = sum + tiles.chunks * hw,
      *ties = memory ? max + tiles.chunks * hw : nullptr;
    const A* gates = all_gates ? all_gates + sample * c : nullptr;
    tiles.each(team, [=, &a](const Tile& t) {
      const int64_t at = t.chunk * hw + t.first_pixel;
      if (a.x.pixel == 1) {
        if (ties)
          pool_planes<T, true, true>(a.x, sample, gates, t, sum + at, max + at, ties + at);
        else
          pool_planes<T, true, false>(a.x, sample, gates, t, sum + at, max + at, nullptr);
        return;
      }
      each_pixels<T>(a.x, sample, gates, t, [=](int64_t p, const Pixels<T>& pixels) {
        const auto pooled = pixels.pool();
        store(sum + p, pooled.sum, pixels.count);
        store(max + p, pooled.max, pixels.count);
        if (ties) store(ties + p, pixels.ties(pooled.max), pixels.count);
      });
    });
    T *means = row<T>(a.y, sample, 0), *maxima = row<T>(a.y, sample, 1);
    A* const kept_max = memory ? memory + sample * hw : nullptr;
    A* const kept_ties = memory ? kept_max + a.n * hw : nullptr;
    for_lanes<A>(hw, [=, chunks = tiles.chunks, step = a.y.pixel](int64_t i, auto lanes) {
      const auto [most, tied] = merge<A>(max, ties, chunks, hw, i, lanes);
      Vec<A> total{};
      for (int64_t at = i; at < chunks * hw; at += hw) total += load(sum + at, lanes);
      const Vec<A> mean = total / A(c);
      const int64_t count = std::min<int64_t>(kLanes<A>, hw - i);
      for (int64_t l = 0; l < count; l++) {
        means[(i + l) * step] = static_cast<T>(mean[l]);
        maxima[(i + l) * step] = static_cast<T>(most[l]);
      }
      if (!ties) return;
      store(kept_max + i, most, lanes);
      store(kept_ties + i, tied, lanes);
    });
  });
}

// Writes a gradient, or adds it to what is there.
template <bool kOnto, class T, class V, class L>
CONVBLOCKS_LOOP inline void store_gradient(T* to, V d, L lanes) {
  if constexpr (kOnto) d += load(to, lanes);
  store(to, d, lanes);
}

// Of each pixel: the maximum, the gradient that every channel gets, and what those with the maximum get besides.
template <class A>
struct PixelGradients {
  A *max, *base, *top;
  // A NaN equals nothing, and torch's gradient is NaN there.
  void set(int64_t p, A most, A ties, A grad_mean, A grad_max) const {
    max[p] = most;
    base[p] = ties > 0 ? grad_mean : std::numeric_limits<A>::quiet_NaN();
    top[p] = grad_max / ties;
  }
};

template <class T, bool kOnto>
void backward(const Context& context, const ChannelPoolBackwardArgs& a) {
  using A = Acc<T>;
  const int64_t c = a.c, hw = a.hw;
  const A* all_gates = widened<A>(context, a.channel, a.gate_dtype, a.n * c);
  const bool planes = a.x.pixel == 1;
  const Tiles tiles(c, hw, planes);
  const A* const memory = static_cast<const A*>(a.memory);
  const int64_t pooled = memory ? 0 : tiles.chunks * hw, size = 2 * pooled + 3 * hw + tiles.blocks * c;
  A* workspace = static_cast<A*>(context.workspace(context, a.n * size * sizeof(A)));
  const Narrowed<A> grad_channel(context, a.grad_channel, a.gate_dtype, a.n * c);
  for_each_sample(context, a.n, 2 * c * hw, [&](int64_t sample, const Team& team) {
    A *max = workspace + sample * size, *ties = max + pooled, *next = ties + pooled;
    const PixelGradients<A> pixels{next, next + hw, next + 2 * hw};
    A* by_channel = next + 3 * hw;
    const A* gates = all_gates ? all_gates + sample * c : nullptr;
    const T *grad_mean = row<T>(a.grad, sample, 0), *grad_max = row<T>(a.grad, sample, 1);
    const auto set = [=, &a](int64_t p, A most, A tied) {
      const int64_t at = p * a.grad.pixel;
      pixels.set(p, most, tied, static_cast<A>(grad_mean[at]) / A(c), static_cast<A>(grad_max[at]));
    };
    if (memory) {
      const A *const kept_max = memory + sample * hw, *const kept_ties = kept_max + a.n * hw;
      team.split(hw, 8, [=](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; p++) set(p, kept_max[p], kept_ties[p]);
      });
    } else if (planes) {
      tiles.each(team, [=, &a](const Tile& t) {
        const int64_t at = t.chunk * hw + t.first_pixel;
        pool_planes<T, false, true>(a.x, sample, gates, t, nullptr, max + at, ties + at);
      });
      for_lanes<A>(hw, [=, chunks = tiles.chunks](int64_t i, auto lanes) {
        const auto [most, tied] = merge<A>(max, ties, chunks, hw, i, lanes);
        const int64_t count = std::min<int64_t>(kLanes<A>, hw - i);
        for (int64_t l = 0; l < count; l++) set(i + l, most[l], tied[l]);
      });
    }
    tiles.each(team, [=, &a](const Tile& t) {
      A* sums = by_channel + t.block * c + t.first_channel;
      if (planes) {
        const A *most = pixels.max + t.first_pixel, *base = pixels.base + t.first_pixel,
                *top = pixels.top + t.first_pixel;
        return by_four(t.channels, [&]<int G>(int64_t k, std::integral_constant<int, G>) {
          const int64_t i = t.first_channel + k;
          const T* const x = row<T>(a.x, sample, i, t.first_pixel);
          T* const to = row<T>(a.grad_x, sample, i, t.first_pixel);
          std::array<A, G> gate;
          for (int g = 0; g < G; g++) gate[g] = gates ? gates[i + g] : A(1);
          Vec<A> sum[G]{};
          for_lanes<T>(t.pixels, [&, x, to, most, base, top, gate, from = a.x.channel, stride = a.grad_x.channel](
                                     int64_t p, auto lanes) CONVBLOCKS_LOOP {
            const Vec<A> peak = load(most + p, lanes), all = load(base + p, lanes), more = load(top + p, lanes);
#pragma GCC unroll 4
            for (int g = 0; g < G; g++) {
              const Vec<A> v = load(x + g * from + p, lanes);
              const Vec<A> d = all + (v * gate[g] == peak ? more : Vec<A>{});
              store_gradient<kOnto>(to + g * stride + p, d * gate[g], lanes);
              sum[g] += d * v;
            }
          });
          for (int g = 0; g < G; g++) sums[k + g] = sum_lanes(sum[g]);
        });
      }
      std::fill_n(sums, c, A(0));
      each_pixels<T>(a.x, sample, gates, t, [=, &a](int64_t first, const Pixels<T>& some) {
        if (!memory) {
          const Vec<A> most = some.pool().max, tied = some.ties(most);
          for (int l = 0; l < some.count; l++) set(first + l, most[l], tied[l]);
        }
        some.each_group([&, sums]<int G>(int64_t l, std::integral_constant<int, G>, auto gate) CONVBLOCKS_LOOP {
          const int64_t p = first + l;
          const T* const x = some.x + l * some.stride;
          T* const to = row<T>(a.grad_x, sample, 0, p);
          std::array<Vec<A>, G> peak, base, top;
          for (int g = 0; g < G; g++) {
            peak[g] = splat<Vec<A>>(pixels.max[p + g]);
            base[g] = splat<Vec<A>>(pixels.base[p + g]);
            top[g] = splat<Vec<A>>(pixels.top[p + g]);
          }
          for_lanes<T>(c, [=, from = some.stride, stride = a.grad_x.pixel](int64_t i, auto lanes) CONVBLOCKS_LOOP {
            const Vec<A> own = gate(i, lanes);
            Vec<A> sum = load(sums + i, lanes);
#pragma GCC unroll 4
            for (int g = 0; g < G; g++) {
              const Vec<A> v = load(x + g * from + i, lanes);
              const Vec<A> d = base[g] + (v * own == peak[g] ? top[g] : Vec<A>{});
              store_gradient<kOnto>(to + g * stride + i, d * own, lanes);
              sum += d * v;
            }
            store(sums + i, sum, lanes);
          });
        });
      });
    });
    if (a.grad_channel) add_parts(by_channel, tiles.blocks, c, grad_channel + sample * c);
  });
}

}  // namespace
}  // namespace convblocks::cpu

const bool convblocks_channel_pool_remembers = true;

const char* convblocks_channel_pool(const convblocks::Context& context, const convblocks::ChannelPoolArgs& args) {
  return convblocks::cpu::dispatch(args.dtype, [&]<class T>(T) { convblocks::cpu::forward<T>(context, args); });
}

const char* convblocks_channel_pool_backward(const convblocks::Context& context,
                                             const convblocks::ChannelPoolBackwardArgs& args) {
  return convblocks::cpu::dispatch(args.dtype, [&]<class T>(T) { convblocks::cpu::backward<T, false>(context, args); });
}

const char* convblocks_channel_pool_backward_onto(const convblocks::Context& context,
                                                  const convblocks::ChannelPoolBackwardArgs& args) {
  return convblocks::cpu::dispatch(args.dtype, [&]<class T>(T) { convblocks::cpu::backward<T, true>(context, args); });
}

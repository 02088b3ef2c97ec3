// Concurrent spatial and channel squeeze-and-excitation on the CPU. A sample is squeezed both ways in one read, and
// gated in another while it is in the cache; without channel gates so is each stretch of its pixels. The backward
// likewise; where the gradient of one gate needs the other (max, mul), it reads the sample once more before.
#include "../scse.h"

#include "both_sums.h"
#include "channel_gate.h"
#include "dispatch.h"
#include "layers.h"

namespace convblocks::cpu {
namespace {

template <Combine kCombine>
inline constexpr bool kCrossed = kCombine == Combine::max || kCombine == Combine::mul;

template <Combine kCombine, class V>
CONVBLOCKS_LOOP inline V combine(V x, V s, V q) {
  switch (kCombine) {
    case Combine::max: return max_or_nan(x * s, x * q);
    case Combine::mul: return (x * s) * (x * q);
    case Combine::spatial: return x * q;
    default: return x * s + x * q;
  }
}

// The gradients of x s and of x q.
template <class V>
struct Slopes {
  V channel, spatial;
};
template <Combine kCombine, class V>
CONVBLOCKS_LOOP inline Slopes<V> slopes(V grad, V grad_spatial, V x, V s, V q) {
  if constexpr (kCombine == Combine::max) {
    const V a = x * s, b = x * q, half = a == b ? grad / 2 : grad;
    return {a < b ? V{} : half, a > b ? V{} : half};
  }
  if constexpr (kCombine == Combine::mul) return {grad * (x * q), grad * (x * s)};
  return {grad, grad_spatial};
}

template <class F>
void with_combine(Combine combine, F f) {
  switch (combine) {
    case Combine::add: return f(std::integral_constant<Combine, Combine::add>{});
    case Combine::max: return f(std::integral_constant<Combine, Combine::max>{});
    case Combine::mul: return f(std::integral_constant<Combine, Combine::mul>{});
    case Combine::concat: return f(std::integral_constant<Combine, Combine::concat>{});
    case Combine::spatial: return f(std::integral_constant<Combine, Combine::spatial>{});
  }
}

// What forward and backward share: how the work is cut up, and the parameters of the gates of pixels.
template <class T, bool kPlanes>
struct Work {
  using A = Acc<T>;
  const Context& context;
  int64_t n, c, hw;
  Combine combine;
  const A* w;
  A bias;
  int64_t length, pieces;  // of a sample, so many pixels each

  template <class Args>
  Work(const Context& context, const Args& a)
      : context(context), n(a.n), c(a.c), hw(a.hw), combine(a.combine), length(a.hw) {
    w = widened<A>(context, a.w, a.channel.dtype, c);
    bias = a.b ? *widened<A>(context, a.b, a.channel.dtype, 1) : A(0);
    constexpr int64_t block = 128, bytes = 1 << 18;
    const int64_t fitting = bytes / static_cast<int64_t>(c * sizeof(T)) / block * block;
    if (combine == Combine::spatial) length = std::min(hw, std::max(block, fitting));
    pieces = (hw + length - 1) / length;
  }
  int64_t items() const { return n * pieces; }
  int64_t pixels(int64_t item) const { return std::min(length, hw - item % pieces * length); }
  Part<T, kPlanes> part(const Map& map, int64_t item) const {
    return {row<T>(map, item / pieces, 0, item % pieces * length), kPlanes ? map.channel : map.pixel};
  }
  bool exceeds() const { return exceeds_caches(n * c * hw * sizeof(T)); }

  // Means of the channels, and gates of the pixels, from the sums.
  void finish(A* pooled, A* q, int64_t count) const {
    if (combine != Combine::spatial) finish_squeeze<A>(pooled, nullptr, c, count);
    for_lanes<A>(count, [=, bias = bias](int64_t p, auto lanes)
                            CONVBLOCKS_LOOP { store(q + p, sigmoid(load(q + p, lanes) + bias), lanes); });
  }
  void squeeze(const Team& team, const Map& x, int64_t item, A* partial, A* pooled, A* q) const {
    const auto from = part(x, item);
    const auto run = [&]<int KC>(std::integral_constant<int, KC>) {
      both_sums<T, kPlanes, KC, 1>(team, c, pixels(item), partial, pooled, q,
                                   [from, w = w](int64_t i, int64_t p, auto lanes) CONVBLOCKS_LOOP {
                                     const Vec<A> v = load(from.with_next(i, p), lanes);
                                     Terms<A, KC, 1> terms{{}, {v * of_channel<kPlanes>(w, i, lanes)}};
                                     if constexpr (KC) terms.channel[0] = v;
                                     return terms;
                                   });
    };
    combine == Combine::spatial ? run(std::integral_constant<int, 0>{}) : run(std::integral_constant<int, 1>{});
    finish(pooled, q, pixels(item));
  }
};

template <class T, bool kPlanes>
void forward(const Context& context, const ScseArgs& a) {
  using A = Acc<T>;
  const Work<T, kPlanes> work(context, a);
  const int64_t c = a.c, size = 2 * c + work.length + both_sums_size<T, kPlanes>(c, work.length, 1, 1);
  A* workspace = static_cast<A*>(context.workspace(context, work.items() * size * sizeof(A)));
  const Layers<A> layers(context, a.channel, c);
  A* hidden = static_cast<A*>(context.workspace(context, std::max<int64_t>(1, a.n * layers.r) * sizeof(A)));
  const bool far = work.exceeds();
  const auto apply = [&]<Combine kCombine>(int64_t item, const Team& team) {
    const A *gates = workspace + item * size + c, *q = gates + c;
    const auto from = work.part(a.x, item), to = work.part(a.y, item), spatial = work.part(a.y_spatial, item);
    const int64_t count = work.pixels(item);
    // A row of the output: of the pixels of channel `i`, or the channels of pixel `p`.
    const auto put = [=]<Combine kPart>(T* row, int64_t i, int64_t p) CONVBLOCKS_LOOP {
      write_row<T>(row, kPlanes ? count : c, far, [=](int64_t at, auto lanes) CONVBLOCKS_LOOP {
        const int64_t channel = kPlanes ? i : at, pixel = kPlanes ? at : p;
        const Vec<A> v = load(from.at(channel, pixel), lanes);
        const Vec<A> s = kPart == Combine::spatial ? v : of_channel<kPlanes>(gates, channel, lanes);
        if constexpr (kPart == Combine::concat) return v * s;
        return combine<kPart>(v, s, of_pixel<kPlanes>(q, pixel, lanes));
      });
    };
    team.split(kPlanes ? c : count, kPlanes ? count : c, [=](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        const int64_t i = kPlanes ? r : 0, p = kPlanes ? 0 : r;
        put.template operator()<kCombine>(to.at(i, p), i, p);
        if constexpr (kCombine == Combine::concat) put.template operator()<Combine::spatial>(spatial.at(i, p), i, p);
      }
      finish_stores();
    });
  };
  for_each_group(context, work.items(), group_size<T>(c * work.length), c * work.length,
                 [&](int64_t first, int64_t count, const Team& team) {
                   A* pooled = workspace + first * size;
                   for (int64_t i = first; i < first + count; i++) {
                     A* own = workspace + i * size;
                     work.squeeze(team, a.x, i, own + 2 * c + work.length, own, own + 2 * c);
                   }
                   if (a.combine != Combine::spatial) {
                     A* h = hidden + first * layers.r;
                     layers.forward(count, pooled, h, h, pooled + c, size, pooled + c, size);
                   }
                   with_combine(a.combine, [&]<Combine k>(std::integral_constant<Combine, k>) {
                     for (int64_t i = first; i < first + count; i++) apply.template operator()<k>(i, team);
                   });
                 });
}

// The backward of one item: where its numbers lie, and its passes.
template <class T, bool kPlanes, Combine kCombine>
struct Backward {
  using A = Acc<T>;
  const ScseBackwardArgs& a;
  const Work<T, kPlanes>& work;
  int64_t item, c, count;
  A *pooled, *grad_gates, *gates, *grad_pooled, *dw, *q, *dz, *partial;

  static int64_t size(const Work<T, kPlanes>& work) {
    return 5 * work.c + 2 * work.length + both_sums_size<T, kPlanes>(work.c, work.length, 2, 2);
  }
  Backward(const ScseBackwardArgs& a, const Work<T, kPlanes>& work, int64_t item, A* workspace)
      : a(a), work(work), item(item), c(work.c), count(work.pixels(item)) {
    pooled = workspace + item * size(work);
    grad_gates = pooled + c;
    gates = grad_gates + c;
    grad_pooled = gates + c;
    dw = grad_pooled + c;
    q = dw + c;
    dz = q + count;
    partial = dz + count;
  }

  // Both squeezes, and the gradients of the gates if they do not depend on the other gate.
  void squeeze(const Team& team) const {
    if constexpr (kCrossed<kCombine>) {
      work.squeeze(team, a.x, item, partial, pooled, q);
    } else {
      constexpr int KC = kCombine == Combine::spatial ? 0 : 2;
      const auto x = work.part(a.x, item), grad = work.part(a.grad, item), spatial = work.part(a.grad_spatial, item);
      both_sums<T, kPlanes, KC, 2>(
          team, c, count, partial, pooled, q, [=, w = work.w](int64_t i, int64_t p, auto lanes) CONVBLOCKS_LOOP {
            const Vec<A> v = load(x.with_next(i, p), lanes), g = load(grad.with_next(i, p), lanes);
            Vec<A> by_pixel = g * v;
            if constexpr (kCombine == Combine::concat) by_pixel = load(spatial.with_next(i, p), lanes) * v;
            Terms<A, KC, 2> terms{{}, {v * of_channel<kPlanes>(w, i, lanes), by_pixel}};
            if constexpr (KC) terms.channel = {v, g * v};
            return terms;
          });
      work.finish(pooled, q, count);
      finish_dz();
    }
  }
  void grad_of_crossed_gates(const Team& team) const {
    const auto x = work.part(a.x, item), grad = work.part(a.grad, item);
    both_sums<T, kPlanes, 1, 1>(team, c, count, partial, grad_gates, dz,
                                [=, gates = gates, q = q](int64_t i, int64_t p, auto lanes) CONVBLOCKS_LOOP {
                                  const Vec<A> v = load(x.with_next(i, p), lanes),
                                               g = load(grad.with_next(i, p), lanes);
                                  const auto d = slopes<kCombine>(g, g, v, of_channel<kPlanes>(gates, i, lanes),
                                                                  of_pixel<kPlanes>(q, p, lanes));
                                  return Terms<A, 1, 1>{{d.channel * v}, {d.spatial * v}};
                                });
    finish_dz();
  }
  // From the gradients of the gates of the pixels, those of their logits.
  void finish_dz() const {
    for_lanes<A>(count, [q = q, dz = dz](int64_t p, auto lanes) CONVBLOCKS_LOOP {
      const Vec<A> gated = load(q + p, lanes);
      store(dz + p, load(dz + p, lanes) * (gated * (1 - gated)), lanes);
    });
  }

  // The gradient of x, and the share in that of w.
  void finish(const Team& team, bool far) const {
    constexpr bool spatial_alone = kCombine == Combine::spatial;
    const auto x = work.part(a.x, item), grad = work.part(a.grad, item), spatial = work.part(a.grad_spatial, item),
               to = work.part(a.grad_x, item);
    const A *w = work.w, share = A(1) / A(count);
    const auto value = [=, gates = gates, grad_pooled = grad_pooled, q = q, dz = dz](int64_t i, int64_t p, auto lanes,
                                                                                     Vec<A>& by_w) CONVBLOCKS_LOOP {
      const Vec<A> v = load(x.at(i, p), lanes), g = load(grad.at(i, p), lanes);
      const Vec<A> gs = kCombine == Combine::concat ? load(spatial.at(i, p), lanes) : g;
      const Vec<A> gated = of_pixel<kPlanes>(q, p, lanes), slope = of_pixel<kPlanes>(dz, p, lanes);
      by_w += slope * v;
      const Vec<A> by_z = of_channel<kPlanes>(w, i, lanes) * slope;
      if constexpr (spatial_alone) return gs * gated + by_z;
      const Vec<A> s = of_channel<kPlanes>(gates, i, lanes);
      const auto d = slopes<kCombine>(g, gs, v, s, gated);
      return d.channel * s + d.spatial * gated + (of_channel<kPlanes>(grad_pooled, i, lanes) * share + by_z);
    };
    constexpr int64_t length = Blocks<T, kPlanes>::kPixels;
    if constexpr (kPlanes) {
      team.split(c, 3 * count, [=, count = count, dw = dw](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          A total = 0;
          for (int64_t p = 0; p < count; p += length) {
            Vec<A> by_w{};
            write_row<T>(to.at(i, p), std::min(length, count - p), far,
                         [=, &by_w](int64_t at, auto lanes) CONVBLOCKS_LOOP { return value(i, p + at, lanes, by_w); });
            total += sum_lanes(by_w);
          }
          dw[i] = total;
        }
        finish_stores();
      });
    } else {
      const int64_t chunks = (count + length - 1) / length;
      team.split(chunks, 3 * length * c, [=, c = c, count = count, partial = partial](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; chunk++) {
          A* const sums = partial + chunk * c;
          std::fill_n(sums, c, A(0));
          for (int64_t p = chunk * length; p < std::min(count, (chunk + 1) * length); p++) {
            write_row<T>(to.at(0, p), c, far, [=](int64_t i, auto lanes) CONVBLOCKS_LOOP {
              Vec<A> by_w = load(sums + i, lanes);
              const Vec<A> result = value(i, p, lanes, by_w);
              store(sums + i, by_w, lanes);
              return result;
            });
          }
        }
        finish_stores();
      });
      add_rows(partial, chunks, c, dw);
    }
  }
};

template <class T, bool kPlanes, Combine kCombine>
void backward(const Context& context, const ScseBackwardArgs& a) {
  using A = Acc<T>;
  using Item = Backward<T, kPlanes, kCombine>;
  const Work<T, kPlanes> work(context, a);
  const int64_t c = a.c, size = Item::size(work), items = work.items();
  A* workspace = static_cast<A*>(context.workspace(context, items * size * sizeof(A)));
  const LayersBackward<A> layers(context, a.channel, a.n, c);
  A* hidden = static_cast<A*>(context.workspace(context, std::max<int64_t>(1, a.n * a.channel.reduced) * sizeof(A)));
  const bool far = work.exceeds();
  const int64_t group = group_size<T>(2 * c * work.length);
  for_each_group(context, items, group, 2 * c * work.length, [&](int64_t first, int64_t count, const Team& team) {
    const auto each = [&](auto f) {
      for (int64_t i = first; i < first + count; i++) f(Item(a, work, i, workspace));
    };
    const Item front(a, work, first, workspace);
    each([&](const Item& item) { item.squeeze(team); });
    if constexpr (kCrossed<kCombine>) {
      A* h = hidden + first * a.channel.reduced;
      layers.layers.forward(count, front.pooled, h, h, front.gates, size, front.gates, size);
      each([&](const Item& item) { item.grad_of_crossed_gates(team); });
    }
    if constexpr (kCombine != Combine::spatial) {
      layers(first, count, front.pooled, front.grad_gates, front.gates, front.grad_pooled, size);
    }
    each([&](const Item& item) { item.finish(team, far); });
  });
  if constexpr (kCombine != Combine::spatial) {
    layers.weights(a.grad_w1, a.grad_b1, a.grad_w2, a.grad_b2);
  }
  const Narrowed<A> grad_w(context, a.grad_w, a.channel.dtype, c), grad_b(context, a.grad_b, a.channel.dtype, 1);
  for_lanes<A>(c, [&](int64_t i, auto lanes) {
    Vec<A> total{};
    for (int64_t item = 0; item < items; item++) total += load(Item(a, work, item, workspace).dw + i, lanes);
    store(grad_w + i, total, lanes);
  });
  if (!a.grad_b) return;
  double total = 0;
  for (int64_t i = 0; i < items; i++) {
    const Item item(a, work, i, workspace);
    total += reduce_plane<A, 1>(item.count, [dz = item.dz](int64_t p, auto lanes)
                                                CONVBLOCKS_LOOP { return Vecs<A, 1>{load(dz + p, lanes)}; })[0];
  }
  *grad_b = static_cast<A>(total);
}

// Whether pixels are neighbours, in all maps: one of two channels may have them apart where that of one has not.
bool are_planes(const Map& x, const Map& y) { return x.pixel == 1 && y.pixel == 1; }

}  // namespace
}  // namespace convblocks::cpu

using namespace convblocks;

const char* convblocks_scse(const Context& context, const ScseArgs& args) {
  return cpu::dispatch(args.dtype, [&]<class T>(T) {
    cpu::are_planes(args.x, args.y) ? cpu::forward<T, true>(context, args) : cpu::forward<T, false>(context, args);
  });
}

const char* convblocks_scse_backward(const Context& context, const ScseBackwardArgs& args) {
  return cpu::dispatch(args.dtype, [&]<class T>(T) {
    cpu::with_combine(args.combine, [&]<Combine k>(std::integral_constant<Combine, k>) {
      cpu::are_planes(args.x, args.grad) ? cpu::backward<T, true, k>(context, args)
                                         : cpu::backward<T, false, k>(context, args);
    });
  });
}

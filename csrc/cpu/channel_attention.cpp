// Channel attention on the CPU: mean and maximum of each plane from one read, then the small layers, which both go
// through. The backward pools again, while the sample is in the cache, unless the forward kept what it needs of that.
#include "../channel_attention.h"

#include "channel_gate.h"
#include "dispatch.h"
#include "layers.h"

namespace convblocks::cpu {
namespace {

template <class A>
constexpr A kLowest = -std::numeric_limits<A>::infinity();

// --- mean, maximum, and how many pixels have it -----------------------------------------------------------------------

template <class T>
void pool_plane(const T* x, int64_t hw, Acc<T>* mean, Acc<T>* max) {
  using A = Acc<T>;
  constexpr int L = kLanes<T>, kStep = 4;
  constexpr int64_t kBlock = 64 * kStep * L;  // sums of many terms from sums of few
  std::array<Vec<A>, kStep> most;
  most.fill(splat<Vec<A>>(kLowest<A>));
  double total = 0;
  for (int64_t first = 0; first < hw; first += kBlock) {
    const int64_t end = std::min(hw, first + kBlock);
    std::array<Vec<A>, kStep> sum{};
    int64_t p = first;
    for (; p + kStep * L <= end; p += kStep * L) {
#pragma GCC unroll 4
      for (int s = 0; s < kStep; s++) {
        const Vec<A> v = load(x + p + s * L);
        sum[s] += v;
        most[s] = max_or_nan(most[s], v);
      }
    }
    for (; p + L <= end; p += L) {
      const Vec<A> v = load(x + p);
      sum[0] += v;
      most[0] = max_or_nan(most[0], v);
    }
    if (p < end) {
      const int rest = static_cast<int>(end - p);
      sum[1] += load(x + p, rest);
      most[1] = max_or_nan(most[1], load(x + p, rest, kLowest<A>));
    }
    total += sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  *mean = static_cast<A>(total) / A(hw);
  *max = max_lanes(max_or_nan(max_or_nan(most[0], most[1]), max_or_nan(most[2], most[3])));
}

// The same of G short planes: what the lanes at the end cost is shared.
template <class T, int G>
void pool_together(const T* x, int64_t stride, int64_t hw, Acc<T>* mean, Acc<T>* max) {
  using A = Acc<T>;
  Vec<A> sum[kLanes<T>]{}, most[kLanes<T>];
  std::fill_n(most, kLanes<T>, splat<Vec<A>>(kLowest<A>));
  for_lanes<T>(hw, [&, x, stride](int64_t p, auto lanes) CONVBLOCKS_LOOP {
#pragma GCC unroll 8
    for (int g = 0; g < G; g++) {
      const T* const at = x + g * stride + p;
      sum[g] += load(at, lanes);
      most[g] = max_or_nan(most[g], load(at, lanes, kLowest<A>));
    }
  });
  store(mean, sum_each(sum) / A(hw), G);
  store(max, max_each(most), G);
}

template <class T>
Acc<T> count_plane(const T* x, int64_t hw, Acc<T> max) {
  using A = Acc<T>;  // the lanes that are not there hold NaN, which equals nothing
  return reduce_plane<T, 1>(hw, [=](int64_t p, auto lanes) CONVBLOCKS_LOOP {
    return Vecs<A, 1>{load(x + p, lanes, std::numeric_limits<A>::quiet_NaN()) == max ? splat<Vec<A>>(1) : Vec<A>{}};
  })[0];
}

// How a plane is pooled depends on its size only.
template <class T, bool kTies>
void pool_planes(const Map& x, int64_t sample, int64_t begin, int64_t end, int64_t hw, Acc<T>* mean, Acc<T>* max,
                 Acc<T>* ties) {
  constexpr int G = std::max(1, kLanes<T> / 2);
  const bool is_short = hw <= 16 * kLanes<T>;
  for (int64_t i = begin; i < end;) {
    const T* const plane = row<T>(x, sample, i);
    const int count = is_short && i + G <= end ? G : 1;
    if (!is_short)
      pool_plane(plane, hw, mean + i, max + i);
    else if (count == G)
      pool_together<T, G>(plane, x.channel, hw, mean + i, max + i);
    else
      pool_together<T, 1>(plane, x.channel, hw, mean + i, max + i);
    for (const int64_t stop = i + count; i < stop; i++) {
      if constexpr (kTies) ties[i] = count_plane(row<const T>(x, sample, i), hw, max[i]);
    }
  }
}

// channels_last: of chunks of pixels, sums, maxima and ties of all channels into `partial`, 3 c numbers for each chunk.
template <class T, bool kTies>
void pool_chunk(const Map& x, int64_t sample, int64_t c, int64_t first, int64_t end, Acc<T>* partial) {
  using A = Acc<T>;
  A *sum = partial, *max = sum + c, *ties = max + c;
  std::fill_n(sum, c, A(0));
  std::fill_n(max, c, kLowest<A>);
  std::fill_n(ties, c, A(0));
  const auto rows = [&]<int S>(int64_t p, std::integral_constant<int, S>) {
    const T* at = row<T>(x, sample, 0, p);
    for_lanes<T>(c, [=, stride = x.pixel](int64_t i, auto lanes) CONVBLOCKS_LOOP {
      Vec<A> v[S], total{}, most = load(max + i, lanes);
      const Vec<A> before = most;
#pragma GCC unroll 4
      for (int s = 0; s < S; s++) {
        v[s] = load(at + s * stride + i, lanes);
        total += v[s];
        most = max_or_nan(most, v[s]);
      }
      store(sum + i, load(sum + i, lanes) + total, lanes);
      store(max + i, most, lanes);
      if constexpr (kTies) {
        Vec<A> count = before == most ? load(ties + i, lanes) : Vec<A>{};
#pragma GCC unroll 4
        for (int s = 0; s < S; s++) count += v[s] == most ? splat<Vec<A>>(1) : Vec<A>{};
        store(ties + i, count, lanes);
      }
    });
  };
  int64_t p = first;
  for (; p + 4 <= end; p += 4) rows(p, std::integral_constant<int, 4>{});
  for (; p < end; p++) rows(p, std::integral_constant<int, 1>{});
}

inline int64_t pool_size(bool planes, int64_t c, int64_t hw) { return planes ? 0 : 3 * c * pixel_chunks(hw); }

template <class T, bool kTies>
void pool_sample(const Team& team, const Map& x, int64_t sample, int64_t c, int64_t hw, Acc<T>* partial, Acc<T>* mean,
                 Acc<T>* max, Acc<T>* ties) {
  using A = Acc<T>;
  if (x.pixel == 1) {
    team.split(c, 2 * hw,
               [=](int64_t begin, int64_t end) { pool_planes<T, kTies>(x, sample, begin, end, hw, mean, max, ties); });
    return;
  }
  const int64_t chunks = pixel_chunks(hw);
  team.split(chunks, kPixelChunk * c, [=](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k++) {
      pool_chunk<T, kTies>(x, sample, c, k * kPixelChunk, std::min(hw, (k + 1) * kPixelChunk), partial + k * 3 * c);
    }
  });
  for_lanes<A>(c, [=](int64_t i, auto lanes) {
    Vec<A> total{}, most = splat<Vec<A>>(kLowest<A>), count{};
    for (int64_t k = 0; k < chunks; k++) {
      const A* part = partial + k * 3 * c + i;
      const Vec<A> top = load(part + c, lanes), merged = max_or_nan(most, top);
      total += load(part, lanes);
      count = (most == merged ? count : Vec<A>{}) + (top == merged ? load(part + 2 * c, lanes) : Vec<A>{});
      most = merged;
    }
    store(mean + i, total / A(hw), lanes);
    store(max + i, most, lanes);
    if constexpr (kTies) store(ties + i, count, lanes);
  });
}

// --- the layers -------------------------------------------------------------------------------------------------------

// Of each sample: mean and maximum (2 c numbers), what the first layer makes of each (2 r), the sum of both activated (r),
// the logits (c), and how many pixels have the maximum (c).
template <class A>
struct Numbers {
  A *pooled, *hidden, *active, *logits, *ties;
  // In the memory of the operation, if there is one.
  Numbers(const Context& context, void* memory, int64_t n, int64_t c, int64_t r) {
    pooled = static_cast<A*>(memory ? memory : context.workspace(context, n * (4 * c + 3 * r) * sizeof(A)));
    hidden = pooled + 2 * n * c;
    active = hidden + 2 * n * r;
    logits = active + n * r;
    ties = logits + n * c;
  }
  Numbers at(int64_t sample, int64_t c, int64_t r) const {
    Numbers other = *this;
    other.pooled += 2 * sample * c;
    other.hidden += 2 * sample * r;
    other.active += sample * r;
    other.logits += sample * c;
    other.ties += sample * c;
    return other;
  }
};

template <class A>
void run_layers(const Layers<A>& layers, int64_t count, const Numbers<A>& s) {
  const int64_t c = layers.c, r = layers.r;
  linear(2 * count, r, c, layers.w1, layers.b1, s.pooled, c, s.hidden, r);
  for (int64_t i = 0; i < count; i++) {
    const A* hidden = s.hidden + 2 * i * r;
    for_lanes<A>(r, [=, kind = layers.activation, to = s.active + i * r](int64_t j, auto lanes) CONVBLOCKS_LOOP {
      store(to + j, activate(load(hidden + j, lanes), kind) + activate(load(hidden + r + j, lanes), kind), lanes);
    });
  }
  linear(count, c, r, layers.w2, layers.b2, s.active, r, s.logits, c);
  for (int64_t i = 0; layers.b2 && i < count; i++) {  // once for each way to pool
    for_lanes<A>(c, [=, to = s.logits + i * c, b2 = layers.b2](int64_t j, auto lanes)
                        CONVBLOCKS_LOOP { store(to + j, load(to + j, lanes) + load(b2 + j, lanes), lanes); });
  }
}

template <class T>
void forward(const Context& context, const ChannelAttentionArgs& a) {
  using A = Acc<T>;
  const Layers<A> layers(context, a.weights, a.c);
  const int64_t c = a.c, hw = a.hw, size = pool_size(a.x.pixel == 1, c, hw);
  const Numbers<A> all(context, a.memory, a.n, c, layers.r);
  A* workspace = static_cast<A*>(context.workspace(context, std::max<int64_t>(1, a.n * size) * sizeof(A)));
  for_each_group(context, a.n, kMostInGroup<T>, c * hw, [&](int64_t first, int64_t count, const Team& team) {
    const Numbers<A> own = all.at(first, c, layers.r);
    for (int64_t s = 0; s < count; s++) {
      A *const mean = own.pooled + 2 * s * c, *const partial = workspace + (first + s) * size;
      if (a.memory)
        pool_sample<T, true>(team, a.x, first + s, c, hw, partial, mean, mean + c, own.ties + s * c);
      else
        pool_sample<T, false>(team, a.x, first + s, c, hw, partial, mean, mean + c, nullptr);
    }
    run_layers(layers, count, own);
    for_lanes<T>(count * c,
                 [=, gate = layers.gate, to = static_cast<T*>(a.y) + first * c](int64_t i, auto lanes)
                     CONVBLOCKS_LOOP { store(to + i, apply_gate(load(own.logits + i, lanes), gate), lanes); });
  });
}

// `mean` and `max` hold the gradients of the pooled numbers, and then what every pixel of a plane gets, and what those
// with the maximum get besides.
template <class T, bool kOnto>
void write_gradient(const Team& team, const ChannelAttentionBackwardArgs& a, int64_t sample, Acc<T>* mean, Acc<T>* max,
                    const Acc<T>* top, const Acc<T>* ties, bool far) {
  using A = Acc<T>;
  const int64_t c = a.c, hw = a.hw;
  const Map x = a.x, to = a.grad_x;
  for_lanes<A>(c, [=](int64_t i, auto lanes) CONVBLOCKS_LOOP {
    store(mean + i, load(mean + i, lanes) / A(hw), lanes);
    store(max + i, load(max + i, lanes) / load(ties + i, lanes), lanes);
  });
  if (x.pixel == 1) {
    team.split(c, 2 * hw, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const T* v = row<T>(x, sample, i);
        const A base = mean[i], peak = top[i], more = max[i];
        T* const grad = row<T>(to, sample, i);
        write_row<T>(grad, hw, far, [=](int64_t p, auto lanes) CONVBLOCKS_LOOP {
          const Vec<A> d = base + (load(v + p, lanes) == peak ? splat<Vec<A>>(more) : Vec<A>{});
          return kOnto ? load(grad + p, lanes) + d : d;
        });
      }
      finish_stores();
    });
    return;
  }
  team.split(hw, 2 * c, [=](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++) {
      const T* v = row<T>(x, sample, 0, p);
      T* const grad = row<T>(to, sample, 0, p);
      write_row<T>(grad, c, far, [=](int64_t i, auto lanes) CONVBLOCKS_LOOP {
        const Vec<A> more = load(max + i, lanes);
        const Vec<A> d = load(mean + i, lanes) + (load(v + i, lanes) == load(top + i, lanes) ? more : Vec<A>{});
        return kOnto ? load(grad + i, lanes) + d : d;
      });
    }
    finish_stores();
  });
}

template <class T, bool kOnto>
void backward(const Context& context, const ChannelAttentionBackwardArgs& a) {
  using A = Acc<T>;
  const Layers<A> layers(context, a.weights, a.c);
  const int64_t n = a.n, c = a.c, hw = a.hw, r = layers.r;
  const int64_t size = 2 * c + (a.memory ? 0 : pool_size(a.x.pixel == 1, c, hw));
  const Numbers<A> all(context, const_cast<void*>(a.memory), n, c, r);
  A* workspace = static_cast<A*>(context.workspace(context, n * (size + c + 2 * r) * sizeof(A)));
  A *const grad_logits = workspace + n * size, *const grad_hidden = grad_logits + n * c;
  const bool far = !kOnto && exceeds_caches(n * c * hw * sizeof(T));
  for_each_group(
      context, n, group_size<T>(2 * c * hw, 2 * c * r), 2 * c * hw,
      [&](int64_t first, int64_t count, const Team& team) {
        const Numbers<A> own = all.at(first, c, r);
        const auto space = [=](int64_t s) { return workspace + (first + s) * size; };
        if (!a.memory) {
          for (int64_t s = 0; s < count; s++) {
            A* const mean = own.pooled + 2 * s * c;
            pool_sample<T, true>(team, a.x, first + s, c, hw, space(s) + 2 * c, mean, mean + c, own.ties + s * c);
          }
          run_layers(layers, count, own);
        }
        const T* grad = static_cast<const T*>(a.grad) + first * c;
        A *const by_logit = grad_logits + first * c, *const by_hidden = grad_hidden + 2 * first * r;
        for_lanes<T>(count * c, [=, gate = layers.gate](int64_t i, auto lanes) CONVBLOCKS_LOOP {
          const Vec<A> logit = load(own.logits + i, lanes);
          store(by_logit + i, gate_backward(load(grad + i, lanes), logit, apply_gate(logit, gate), gate), lanes);
        });
        by_groups(count, [&]<int G>(int64_t s, std::integral_constant<int, G>) {
          sum_rows<G, A>(
              c, r, layers.w2, [=, logits = by_logit + s * c](int64_t i, int g) { return logits[g * c + i]; },
              [=, kind = layers.activation](int g, int64_t j, auto lanes, Vec<A> sum) {
                for (const int64_t at : {2 * (s + g) * r + j, (2 * (s + g) + 1) * r + j})
                  store(by_hidden + at, activation_backward(sum, load(own.hidden + at, lanes), kind), lanes);
              });
        });
        by_groups(2 * count, [&]<int G>(int64_t row, std::integral_constant<int, G>) {  // for means and maxima in turn
          sum_rows<G, A>(
              r, c, layers.w1, [=, hidden = by_hidden + row * r](int64_t i, int g) { return hidden[g * r + i]; },
              [=](int g, int64_t j, auto lanes, Vec<A> sum) {
                store(space((row + g) / 2) + (row + g) % 2 * c + j, sum, lanes);
              });
        });
        for (int64_t s = 0; s < count; s++) {
          A* const by_mean = space(s);
          write_gradient<T, kOnto>(team, a, first + s, by_mean, by_mean + c, own.pooled + (2 * s + 1) * c,
                                   own.ties + s * c, far);
        }
      });
  const auto to = [&](void* data, int64_t count) { return Narrowed<A>(context, data, a.weights.dtype, count); };
  sum_of_products(context, n, c, r, grad_logits, all.active, to(a.grad_w2, c * r), nullptr);
  sum_of_products(context, 2 * n, r, c, grad_hidden, all.pooled, to(a.grad_w1, r * c), to(a.grad_b1, r));
  const auto grad_b2 = to(a.grad_b2, c);
  for (int64_t i = 0; a.grad_b2 && i < c; i++) {
    A sum = 0;
    for (int64_t s = 0; s < n; s++) sum += grad_logits[s * c + i];
    grad_b2[i] = 2 * sum;  // once for each way to pool
  }
}

}  // namespace
}  // namespace convblocks::cpu

const bool convblocks_channel_attention_remembers = true;

const char* convblocks_channel_attention(const convblocks::Context& context,
                                         const convblocks::ChannelAttentionArgs& args) {
  return convblocks::cpu::dispatch(args.dtype, [&]<class T>(T) { convblocks::cpu::forward<T>(context, args); });
}

const char* convblocks_channel_attention_backward(const convblocks::Context& context,
                                                  const convblocks::ChannelAttentionBackwardArgs& args) {
  return convblocks::cpu::dispatch(args.dtype, [&]<class T>(T) { convblocks::cpu::backward<T, false>(context, args); });
}

const char* convblocks_channel_attention_backward_onto(const convblocks::Context& context,
                                                       const convblocks::ChannelAttentionBackwardArgs& args) {
  return convblocks::cpu::dispatch(args.dtype, [&]<class T>(T) { convblocks::cpu::backward<T, true>(context, args); });
}

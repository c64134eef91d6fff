// Vocab-parallel cross-entropy: one pass for the row statistics, one for the gradient. Offsets are 64-bit: a batch of
// 65,536 tokens by 128,256 columns has 8.4e9 logits.
#include "launch.h"

namespace neox {
namespace {

constexpr int kBlock = 256;
constexpr int kUnroll = 4;
constexpr float kLog2e = 1.4426950408889634f;
// Initial maximum; -inf would lead to inf - inf. Smaller logits count as exp(-inf) = 0.
constexpr float kLowest = -1e30f;

// exp(x - base): one fma and one v_exp for 16-bit logits, expf for fp32.
template <class T>
__device__ __forceinline__ float exp_below(float x, float base) {
  if constexpr (std::is_same_v<T, float>) {
    return expf(x - base);
  } else {
    return fast_exp2(x * kLog2e - base * kLog2e);
  }
}

__device__ __forceinline__ float larger(float a, float b) { return a > b ? a : b; }

// Adds N elements to a running (max, sum) with one rescale: a naive online softmax takes two exponentials per element
// and is compute-bound on gfx90a.
template <class T, int N>
__device__ __forceinline__ void add_to(const float (&x)[N], float& peak, float& sum) {
  float top = peak;
  NEOX_UNROLL
  for (int i = 0; i < N; ++i) top = larger(top, x[i]);
  float part = 0.0f;
  NEOX_UNROLL
  for (int i = 0; i < N; ++i) part += exp_below<T>(x[i], top);
  sum = sum * exp_below<T>(peak, top) + part;
  peak = top;
}

// One block per row.
template <class T, int WAVE, int VEC>
NEOX_KERNEL(kBlock)
cross_entropy_stats(ptr<float> NEOX_RESTRICT stats, ptr<const T> NEOX_RESTRICT logits,
                    ptr<const int64_t> NEOX_RESTRICT labels, int64_t vocab_start, int64_t rows, int64_t width,
                    int64_t stride) {
  constexpr int kWaves = kBlock / WAVE;
  __shared__ Shared<float, 2 * kWaves> slots;
  const int64_t row = block_x();
  const ptr<const T> line = logits + row * stride;
  float peak = kLowest, sum = 0.0f;
  const int whole = static_cast<int>(width / VEC);
  int v = thread_index();
  // kUnroll vectors at a time, all loads before the first use; then single vectors; then the last elements.
  for (; v + (kUnroll - 1) * kBlock < whole; v += kUnroll * kBlock) {
    float x[kUnroll * VEC];
    if constexpr (VEC == 1) {
      NEOX_UNROLL
      for (int u = 0; u < kUnroll; ++u) x[u] = Element<T>::widen(load_raw<T>(line, v + u * kBlock));
    } else {
      Packed packed[kUnroll];
      NEOX_UNROLL
      for (int u = 0; u < kUnroll; ++u) packed[u] = load_packed<T>(line, static_cast<int64_t>(v + u * kBlock) * VEC);
      NEOX_UNROLL
      for (int u = 0; u < kUnroll; ++u) {
        float part[VEC];
        unpack<T>(packed[u], part);
        NEOX_UNROLL
        for (int i = 0; i < VEC; ++i) x[u * VEC + i] = part[i];
      }
    }
    add_to<T>(x, peak, sum);
  }
  for (; v < whole; v += kBlock) {
    float x[VEC];
    load<T>(line, static_cast<int64_t>(v) * VEC, x);
    add_to<T>(x, peak, sum);
  }
  if (const int64_t c = static_cast<int64_t>(whole) * VEC + thread_index(); c < width) {
    const float x[1] = {Element<T>::widen(load_raw<T>(line, c))};
    add_to<T>(x, peak, sum);
  }
  // Reduce over the lanes of each wave, then over the waves in a fixed order.
  const int wave = thread_index() / WAVE;
  const float wave_peak = wave_max<WAVE>(peak);
  const float wave_total = wave_sum<WAVE>(sum * exp_below<T>(peak, wave_peak));
  if (thread_index() % WAVE == 0) {
    slots.set(wave, wave_peak);
    slots.set(kWaves + wave, wave_total);
  }
  block_barrier();
  if (thread_index() == 0) {
    float top = kLowest, total = 0.0f;
    NEOX_UNROLL
    for (int i = 0; i < kWaves; ++i) top = larger(top, slots.get(i));
    NEOX_UNROLL
    for (int i = 0; i < kWaves; ++i) total += slots.get(kWaves + i) * exp_below<T>(slots.get(i), top);
    const int64_t target = load_raw<int64_t>(labels, row) - vocab_start;
    store_raw<float>(stats, row, top);
    store_raw<float>(stats, rows + row, total);
    store_raw<float>(stats, 2 * rows + row,
                     target >= 0 && target < width ? Element<T>::widen(load_raw<T>(line, target)) : -INFINITY);
  }
}

// One thread per row: lse = M + log(sum of s_i exp(m_i - M)).
NEOX_KERNEL(kBlock)
cross_entropy_combine(ptr<float> NEOX_RESTRICT loss, ptr<float> NEOX_RESTRICT lse, ptr<const float> NEOX_RESTRICT stats,
                      ptr<const int64_t> NEOX_RESTRICT labels, int64_t ignore_index, int64_t ranks, int64_t rows) {
  const int64_t row = block_x() * kBlock + thread_index();
  if (row < rows) {
    float top = kLowest, total = 0.0f, target = -INFINITY;
    for (int64_t rank = 0; rank < ranks; ++rank) top = larger(top, load_raw<float>(stats, 3 * rank * rows + row));
    for (int64_t rank = 0; rank < ranks; ++rank) {
      total += load_raw<float>(stats, (3 * rank + 1) * rows + row) * expf(load_raw<float>(stats, 3 * rank * rows + row) - top);
      target = larger(target, load_raw<float>(stats, (3 * rank + 2) * rows + row));
    }
    const float value = top + logf(total);
    store_raw<float>(lse, row, value);
    store_raw<float>(loss, row, load_raw<int64_t>(labels, row) == ignore_index ? 0.0f : value - target);
  }
}

constexpr int kGradientVectors = 2;  // loads in flight per thread: one is half of what keeps an H200 busy

// One block handles 512 vectors of one row; softmax - onehot is computed in fp32 and rounded once.
template <class T, int VEC>
NEOX_KERNEL(kBlock)
cross_entropy_gradient(ptr<T> gradient, ptr<const T> logits, ptr<const int64_t> NEOX_RESTRICT labels,
                       int64_t vocab_start, int64_t ignore_index, ptr<const float> NEOX_RESTRICT lse,
                       ptr<const float> NEOX_RESTRICT dloss, int64_t rows, int64_t width, int64_t columns,
                       int64_t stride, int64_t gradient_stride) {
  const int64_t row = row_of_block(), first = (block_x() * kBlock * kGradientVectors + thread_index()) * VEC;
  if (row < rows && first < columns) {
    float x[kGradientVectors][VEC];
    NEOX_UNROLL
    for (int v = 0; v < kGradientVectors; ++v) {
      const int64_t c = first + v * kBlock * VEC;
      load<T>(logits + row * stride, c < columns ? c : first, x[v]);
    }
    const int64_t label = load_raw<int64_t>(labels, row);
    const float total = load_raw<float>(lse, row), scale = load_raw<float>(dloss, row);
    const bool ignored = label == ignore_index;
    NEOX_UNROLL
    for (int v = 0; v < kGradientVectors; ++v) {
      const int64_t c = first + v * kBlock * VEC, target = label - vocab_start - c;
      NEOX_UNROLL
      for (int i = 0; i < VEC; ++i) {
        const float p = exp_below<T>(x[v][i], total) - (target == i ? 1.0f : 0.0f);
        x[v][i] = ignored || c + i >= width ? 0.0f : p * scale;
      }
      if (c < columns) store<T>(gradient + row * gradient_stride, c, x[v]);
    }
  }
}

}  // namespace
}  // namespace neox

using namespace neox;

extern "C" int neox_cross_entropy_stats(void* stream, int type, float* stats, const void* logits, const int64_t* labels,
                                        int64_t vocab_start, int64_t rows, int64_t width, int64_t stride) {
  if (rows <= 0 || width < 0 || width >= (int64_t{1} << 30))
    return refuse("cross entropy: needs at least one row, and a width of 0 to 2^30 - 1");
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto vector) {
      return with_wave([&](auto wave) {
        return NEOX_LAUNCH(stream, rows, kBlock,
                           (cross_entropy_stats<T, decltype(wave)::value, decltype(vector)::value>), stats,
                           static_cast<const T*>(logits), labels, vocab_start, rows, width, stride);
      });
    };
    const bool whole = stride % kVector<T> == 0 && aligned(logits);
    return whole ? run(std::integral_constant<int, kVector<T>>{}) : run(std::integral_constant<int, 1>{});
  });
}

extern "C" int neox_cross_entropy_combine(void* stream, float* loss, float* lse, const float* stats,
                                          const int64_t* labels, int64_t ignore_index, int64_t ranks, int64_t rows) {
  if (rows <= 0 || ranks <= 0) return refuse("cross entropy: rows and ranks must be positive");
  return NEOX_LAUNCH(stream, ceil_div(rows, kBlock), kBlock, cross_entropy_combine, loss, lse, stats, labels,
                     ignore_index, ranks, rows);
}

extern "C" int neox_cross_entropy_gradient(void* stream, int type, void* gradient, const void* logits,
                                           const int64_t* labels, int64_t vocab_start, int64_t ignore_index,
                                           const float* lse, const float* dloss, int64_t rows, int64_t width,
                                           int64_t columns, int64_t stride, int64_t gradient_stride) {
  if (rows <= 0 || columns <= 0) return refuse("cross entropy: rows and columns must be positive");
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto vector) {
      constexpr int VEC = decltype(vector)::value;
      const int64_t chunks = ceil_div(columns, kBlock * kGradientVectors * VEC);
      return NEOX_LAUNCH(stream, rows_by(chunks, rows), kBlock, (cross_entropy_gradient<T, VEC>),
                         static_cast<T*>(gradient), static_cast<const T*>(logits), labels, vocab_start, ignore_index,
                         lse, dloss, rows, width, columns, stride, gradient_stride);
    };
    const bool whole = columns % kVector<T> == 0 && stride % kVector<T> == 0 && gradient_stride % kVector<T> == 0 &&
                       aligned(gradient) && aligned(logits);
    return whole ? run(std::integral_constant<int, kVector<T>>{}) : run(std::integral_constant<int, 1>{});
  });
}

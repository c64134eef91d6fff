// Backward RMSNorm with optional residual add: gradients of the input and of the weight in two launches.
//
// One or more waves hold a row in registers. The weight gradient is summed without atomics: every group of waves walks
// its rows in a fixed order and writes one fp32 row of partial sums; a second kernel adds these rows in a fixed order.
// The number of groups depends only on the shape and the device's compute units, so that two runs give the same bits.
#include "norm_rows.h"

namespace neox {
namespace {

constexpr int kBackwardVectors = 2;
// Resident waves per compute unit, limited by registers: up to 128 per lane allow four per SIMD of gfx90a, 16 on sm_90.
constexpr int kWavesPerUnit = 16;

// Group g of `groups` walks rows g, g + groups, ...; the next row is fetched while this one is reduced.
template <class T, int WAVE, int PER, int WAVES, bool ADD, bool HF>
NEOX_KERNEL((Row<T, WAVE, PER, WAVES>::kThreads))
rms_norm_backward(ptr<T> NEOX_RESTRICT dx, ptr<float> NEOX_RESTRICT partial, ptr<const T> NEOX_RESTRICT dy,
                  ptr<const T> NEOX_RESTRICT x, ptr<const T> NEOX_RESTRICT weight, ptr<const float> NEOX_RESTRICT rstd,
                  ptr<const T> NEOX_RESTRICT dsum, int64_t rows, int width, int64_t dy_stride, int64_t x_stride,
                  int64_t dsum_stride, int64_t groups) {
  using Shape = Row<T, WAVE, PER, WAVES>;
  constexpr int VEC = kVector<T>, kWaves = Shape::kThreads / WAVE;
  __shared__ Shared<float, 2 * kWaves> slots;  // two sets, used alternately: one barrier per row
  const uint32_t lane = thread_index() % Shape::kLanes;
  const int64_t group = block_x() * Shape::kRowsPerBlock + wave_uniform(thread_index() / Shape::kLanes);
  const uint32_t last = width - VEC;
  const float inverse_width = 1.0f / static_cast<float>(width);

  uint32_t column[PER];
  Packed w[PER], xv[PER], gv[PER], extra[ADD ? PER : 1];
  float dw[PER][VEC];
  const bool counts = group < groups;  // the last block may have spare groups
  const int64_t first = group < rows ? group : rows - 1;
  NEOX_UNROLL
  for (int p = 0; p < PER; ++p) {
    const uint32_t c = (lane + p * Shape::kLanes) * VEC;
    column[p] = c <= last ? c : last;
    xv[p] = load_packed<T>(x + first * x_stride, column[p]);
    gv[p] = load_packed<T>(dy + first * dy_stride, column[p]);
    w[p] = load_packed<T>(weight, column[p]);
    NEOX_UNROLL
    for (int i = 0; i < VEC; ++i) dw[p][i] = 0.0f;
  }
  const int64_t steps = (rows + groups - 1) / groups;  // the same for every group: all threads reach each barrier
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t row = step * groups + group;
    const bool live = counts && row < rows;
    const int64_t here = row < rows ? row : rows - 1;
    const int64_t next = row + groups < rows ? row + groups : rows - 1;
    const float r = live ? load_raw<float>(rstd, here) : 0.0f;
    // Fetch the next row before working on this one.
    Packed x_next[PER], g_next[PER];
    NEOX_UNROLL
    for (int p = 0; p < PER; ++p) {
      if constexpr (ADD) extra[p] = load_packed<T>(dsum + here * dsum_stride, column[p]);
      x_next[p] = load_packed<T>(x + next * x_stride, column[p]);
      g_next[p] = load_packed<T>(dy + next * dy_stride, column[p]);
    }
    // dot = sum of x w dy over the row; the weight gradient accumulates in registers.
    float dot = 0.0f;
    NEOX_UNROLL
    for (int p = 0; p < PER; ++p) {
      float a[VEC], g[VEC], b[VEC], part = 0.0f;
      unpack<T>(xv[p], a);
      unpack<T>(gv[p], g);
      unpack<T>(w[p], b);
      NEOX_UNROLL
      for (int i = 0; i < VEC; ++i) {
        part += a[i] * (g[i] * b[i]);
        dw[p][i] += (HF ? rounded<T>(a[i] * r) : a[i] * r) * g[i];
      }
      dot += (lane + p * Shape::kLanes) * VEC <= last ? part : 0.0f;
    }
    dot = group_sum<WAVE, WAVES>(dot, slots, (step & 1) * kWaves);
    // dx = rstd w dy - x c [+ dsum].
    const float c = dot * inverse_width * r * r * r;
    NEOX_UNROLL
    for (int p = 0; p < PER; ++p) {
      float a[VEC], g[VEC], b[VEC];
      forget_unpacked(xv[p]);
      forget_unpacked(gv[p]);
      forget_unpacked(w[p]);
      unpack<T>(xv[p], a);
      unpack<T>(gv[p], g);
      unpack<T>(w[p], b);
      NEOX_UNROLL
      for (int i = 0; i < VEC; ++i) a[i] = r * (g[i] * b[i]) - a[i] * c;
      if constexpr (ADD) {
        unpack<T>(extra[p], b);
        NEOX_UNROLL
        for (int i = 0; i < VEC; ++i) a[i] += b[i];
      }
      if (live && (lane + p * Shape::kLanes) * VEC <= last) store_packed<T>(dx + row * width, column[p], pack<T>(a));
      xv[p] = x_next[p];
      gv[p] = g_next[p];
    }
  }
  // Write this group's row of partial sums of the weight gradient.
  NEOX_UNROLL
  for (int p = 0; p < PER; ++p) {
    if (counts && (lane + p * Shape::kLanes) * VEC <= last) {
      constexpr int kFloats = kVector<float>;
      NEOX_UNROLL
      for (int i = 0; i < VEC; i += kFloats) {
        float part[kFloats];
        NEOX_UNROLL
        for (int j = 0; j < kFloats; ++j) part[j] = dw[p][i + j];
        store<float>(partial + group * width, column[p] + i, part);
      }
    }
  }
}

// Any width, stride and alignment: a block is a group, its partial row is in memory, and each thread owns its columns.
template <class T, int WAVE, bool ADD, bool HF>
NEOX_KERNEL(kGenericBlock)
rms_norm_backward_generic(ptr<T> dx, ptr<float> partial, ptr<const T> dy, ptr<const T> x, ptr<const T> weight,
                          ptr<const float> rstd, ptr<const T> dsum, int64_t rows, int width, int64_t dy_stride,
                          int64_t x_stride, int64_t dsum_stride, int64_t groups) {
  constexpr int kWaves = kGenericBlock / WAVE;
  __shared__ Shared<float, 2 * kWaves> slots;
  const int64_t group = block_x();
  float a[1], g[1], w[1];
  for (int64_t row = group, step = 0; row < rows; row += groups, ++step) {
    float dot = 0.0f;
    for (int c = thread_index(); c < width; c += kGenericBlock) {
      load<T>(x + row * x_stride, c, a);
      load<T>(dy + row * dy_stride, c, g);
      load<T>(weight, c, w);
      dot += a[0] * (g[0] * w[0]);
    }
    dot = group_sum<WAVE, kWaves>(dot, slots, (step & 1) * kWaves);
    const float r = load_raw<float>(rstd, row), k = dot / static_cast<float>(width) * r * r * r;
    for (int c = thread_index(); c < width; c += kGenericBlock) {
      load<T>(x + row * x_stride, c, a);
      load<T>(dy + row * dy_stride, c, g);
      load<T>(weight, c, w);
      const float term = (HF ? rounded<T>(a[0] * r) : a[0] * r) * g[0];
      store_raw<float>(partial, group * width + c, step == 0 ? term : load_raw<float>(partial, group * width + c) + term);
      a[0] = r * (g[0] * w[0]) - a[0] * k;
      if constexpr (ADD) {
        load<T>(dsum + row * dsum_stride, c, g);
        a[0] += g[0];
      }
      store<T>(dx + row * width, c, a);
    }
  }
}

constexpr int kReduceColumns = 32, kReduceRows = 32;

// Adds the partial rows: 32 threads per column, each over every 32nd row, then one sum over the 32 in order.
template <class T>
NEOX_KERNEL(kReduceColumns * kReduceRows)
rms_norm_reduce_partial(ptr<T> NEOX_RESTRICT dweight, ptr<const float> NEOX_RESTRICT partial, int64_t groups, int width) {
  __shared__ Shared<float, kReduceColumns * kReduceRows> sums;
  const int t = thread_index(), lane = t % kReduceColumns, part = t / kReduceColumns;
  const int64_t c = block_x() * kReduceColumns + lane, column = c < width ? c : width - 1;
  float total[1] = {0.0f};
  int64_t row = part;
  for (; row + 3 * kReduceRows < groups; row += 4 * kReduceRows) {
    float v[4];
    NEOX_UNROLL
    for (int i = 0; i < 4; ++i) v[i] = load_raw<float>(partial, (row + i * kReduceRows) * width + column);
    total[0] += (v[0] + v[1]) + (v[2] + v[3]);
  }
  for (; row < groups; row += kReduceRows) total[0] += load_raw<float>(partial, row * width + column);
  sums.set(t, total[0]);
  block_barrier();
  if (part == 0 && c < width) {
    total[0] = 0.0f;
    for (int i = 0; i < kReduceRows; ++i) total[0] += sums.get(i * kReduceColumns + lane);
    store<T>(dweight, c, total);
  }
}

// ------------------------------------------------------------------------------------------------ choice of groups

constexpr int64_t kRowsToAmortise = 24;  // rows per group: partial sums are then 1/18 of the traffic in 16 bits
constexpr int64_t kFewestRows = 4;

// As many groups as the device can hold at once, equally many on every compute unit; fewer where writing and reading
// the partial sums would cost too much, but at least one block per unit while there are rows: idle units cost more.
template <class T, int WAVE>
int64_t partial_rows(int64_t rows, int64_t width, int64_t units) {
  int64_t lanes = WAVE;
  while (lanes < kMostLanes && lanes * kBackwardVectors * kVector<T> < width) lanes *= 2;
  const int64_t block = lanes > kBlock ? lanes : kBlock;
  const int64_t groups = units * (block / lanes);
  int64_t blocks_per_unit = block < kWavesPerUnit * WAVE ? kWavesPerUnit * WAVE / block : 1;
  while (blocks_per_unit > 1 && groups * blocks_per_unit * kRowsToAmortise > rows) --blocks_per_unit;
  const int64_t resident = groups * blocks_per_unit, useful = ceil_div(rows, kFewestRows);
  return resident < useful ? resident : useful;
}

template <class T>
int backward(void* stream, T* dx, T* dweight, float* partial, const T* dy, const T* x, const T* weight,
             const float* rstd, const T* dsum, int64_t rows, int64_t width, int64_t groups, int64_t dy_stride,
             int64_t x_stride, int64_t dsum_stride, bool hf_rounding) {
  const int code = with_wave([&](auto wave) {
    constexpr int WAVE = decltype(wave)::value;
    const auto run = [&](auto add, auto hf) {
      constexpr bool ADD = decltype(add)::value, HF = decltype(hf)::value;
      const auto generic = [&] {
        return NEOX_LAUNCH(stream, groups, kGenericBlock, (rms_norm_backward_generic<T, WAVE, ADD, HF>), dx, partial,
                           dy, x, weight, rstd, dsum, rows, static_cast<int>(width), dy_stride, x_stride, dsum_stride,
                           groups);
      };
      if (!whole_vectors<T>(width, {dy_stride, x_stride, dsum_stride}, {dx, dy, x, weight, dsum, partial}))
        return generic();
      return with_row<T, WAVE, kBackwardVectors>(
          width,
          [&](auto shape, auto waves) {
            using Shape = decltype(shape);
            return NEOX_LAUNCH(stream, ceil_div(groups, Shape::kRowsPerBlock), Shape::kThreads,
                               (rms_norm_backward<T, WAVE, kBackwardVectors, decltype(waves)::value, ADD, HF>), dx,
                               partial, dy, x, weight, rstd, dsum, rows, static_cast<int>(width), dy_stride, x_stride,
                               dsum_stride, groups);
          },
          generic);
    };
    const auto with_add = [&](auto hf) { return dsum ? run(std::true_type{}, hf) : run(std::false_type{}, hf); };
    if constexpr (!std::is_same_v<T, float>) {
      if (hf_rounding) return with_add(std::true_type{});
    }
    return with_add(std::false_type{});
  });
  if (code != 0) return code;
  return NEOX_LAUNCH(stream, ceil_div(width, kReduceColumns), kReduceColumns * kReduceRows,
                     (rms_norm_reduce_partial<T>), dweight, partial, groups, static_cast<int>(width));
}

}  // namespace
}  // namespace neox

using namespace neox;

extern "C" int64_t neox_rms_norm_partial_rows(int type, int64_t rows, int64_t width) {
  int64_t groups = 1;
  with_type(type, [&](auto element) {
    return with_wave([&](auto wave) {
      groups = partial_rows<decltype(element), decltype(wave)::value>(rows, width, neox_compute_units());
      return 0;
    });
  });
  return groups;
}

extern "C" int neox_rms_norm_backward(void* stream, int type, void* dx, void* dweight, float* partial, const void* dy,
                                      const void* x, const void* weight, const float* rstd, const void* dsum,
                                      int64_t rows, int64_t width, int64_t partial_rows, int64_t dy_stride,
                                      int64_t x_stride, int64_t dsum_stride, int hf_rounding) {
  if (!sizes_fit(rows, width)) return refuse("rms_norm: rows and width must be positive, width below 2^30");
  if (partial_rows < 1 || partial_rows > rows) return refuse("rms_norm: give one partial row at least, one a row at most");
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    return backward(stream, static_cast<T*>(dx), static_cast<T*>(dweight), partial, static_cast<const T*>(dy),
                    static_cast<const T*>(x), static_cast<const T*>(weight), rstd, static_cast<const T*>(dsum), rows,
                    width, partial_rows, dy_stride, x_stride, dsum_stride, hf_rounding != 0);
  });
}

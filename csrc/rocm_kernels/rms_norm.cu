// RMSNorm with optional residual add, forward and backward.
//
// A row is held in registers by one or more waves, read once, written once. The weight gradient is summed without
// atomics: every group of waves walks its rows in a fixed order and writes one fp32 row of partial sums, a second
// kernel adds these rows in a fixed order. Group counts depend on the shape only, never on the device.
#include "launch.h"

namespace neox {
namespace {

constexpr int kBlock = 256;
constexpr int kGenericBlock = 256;

// How a row lies in the registers: `PER` vectors in each lane of `WAVES` waves.
template <class T, int WAVE, int PER, int WAVES>
struct Row {
  static constexpr int kLanes = WAVE * WAVES;
  static constexpr int kThreads = kLanes > kBlock ? kLanes : kBlock;
  static constexpr int kRowsPerBlock = kThreads / kLanes;
  static constexpr int64_t kCapacity = static_cast<int64_t>(kLanes) * PER * kVector<T>;
};

// -------------------------------------------------------------------------------------------------------- forward

template <class T, int WAVE, int PER, int WAVES, bool ADD, bool HF>
NEOX_KERNEL((Row<T, WAVE, PER, WAVES>::kThreads))
rms_norm_forward(ptr<T> NEOX_RESTRICT y, ptr<float> NEOX_RESTRICT rstd, ptr<T> NEOX_RESTRICT sum,
                 ptr<const T> NEOX_RESTRICT x, ptr<const T> NEOX_RESTRICT residual, ptr<const T> NEOX_RESTRICT weight,
                 int64_t rows, int width, int64_t x_stride, int64_t residual_stride, float eps) {
  using Shape = Row<T, WAVE, PER, WAVES>;
  constexpr int VEC = kVector<T>;
  __shared__ Shared<float, Shape::kThreads / WAVE> slots;
  const uint32_t lane = thread_index() % Shape::kLanes;
  const int64_t row = block_x() * Shape::kRowsPerBlock + wave_uniform(thread_index() / Shape::kLanes);
  const bool live = row < rows;
  const int64_t source = live ? row : rows - 1;  // dead lanes load what exists and store nothing
  const uint32_t last = width - VEC;

  Packed v[PER], w[PER], extra[ADD ? PER : 1];
  NEOX_UNROLL
  for (int p = 0; p < PER; ++p) {
    const uint32_t c = (lane + p * Shape::kLanes) * VEC;
    v[p] = load_packed<T>(x + source * x_stride, c <= last ? c : last);
    if constexpr (ADD) extra[p] = load_packed<T>(residual + source * residual_stride, c <= last ? c : last);
  }
  NEOX_UNROLL
  for (int p = 0; p < PER; ++p) {
    const uint32_t c = (lane + p * Shape::kLanes) * VEC;
    w[p] = load_packed<T>(weight, c <= last ? c : last);
  }
  float squares = 0.0f;
  NEOX_UNROLL
  for (int p = 0; p < PER; ++p) {
    const uint32_t c = (lane + p * Shape::kLanes) * VEC;
    float a[VEC];
    unpack<T>(v[p], a);
    if constexpr (ADD) {
      float b[VEC];
      unpack<T>(extra[p], b);
      NEOX_UNROLL
      for (int i = 0; i < VEC; ++i) a[i] += b[i];
      v[p] = pack<T>(a);
      unpack<T>(v[p], a);
      if (live && c <= last) store_packed<T>(sum + row * width, c, v[p]);
    }
    float part = 0.0f;
    NEOX_UNROLL
    for (int i = 0; i < VEC; ++i) part += a[i] * a[i];
    squares += c <= last ? part : 0.0f;
  }
  const float scale = rsqrtf(group_sum<WAVE, WAVES>(squares, slots) / static_cast<float>(width) + eps);
  if (live && lane == 0) store_raw<float>(rstd, row, scale);
  NEOX_UNROLL
  for (int p = 0; p < PER; ++p) {
    const uint32_t c = (lane + p * Shape::kLanes) * VEC;
    float a[VEC], b[VEC];
    forget_unpacked(v[p]);
    unpack<T>(v[p], a);
    unpack<T>(w[p], b);
    NEOX_UNROLL
    for (int i = 0; i < VEC; ++i) a[i] = (HF ? rounded<T>(a[i] * scale) : a[i] * scale) * b[i];
    if (live && c <= last) store_packed<T>(y + row * width, c, pack<T>(a));
  }
}

// Any width, stride and alignment: one block a row, one element a lane, the row read twice.
template <class T, int WAVE, bool ADD, bool HF>
NEOX_KERNEL(kGenericBlock)
rms_norm_forward_generic(ptr<T> y, ptr<float> rstd, ptr<T> sum, ptr<const T> x, ptr<const T> residual,
                         ptr<const T> weight, int64_t rows, int width, int64_t x_stride, int64_t residual_stride,
                         float eps) {
  __shared__ Shared<float, kGenericBlock / WAVE> slots;
  const int64_t row = block_x();
  float squares = 0.0f;
  for (int c = thread_index(); c < width; c += kGenericBlock) {
    float a[1];
    load<T>(x + row * x_stride, c, a);
    if constexpr (ADD) {
      float b[1];
      load<T>(residual + row * residual_stride, c, b);
      a[0] = rounded<T>(a[0] + b[0]);
      store<T>(sum + row * width, c, a);
    }
    squares += a[0] * a[0];
  }
  squares = group_sum<WAVE, kGenericBlock / WAVE>(squares, slots);
  const float scale = rsqrtf(squares / static_cast<float>(width) + eps);
  if (thread_index() == 0) store_raw<float>(rstd, row, scale);
  for (int c = thread_index(); c < width; c += kGenericBlock) {
    float a[1], b[1];
    if constexpr (ADD) {
      load<T>(x + row * x_stride, c, a);
      load<T>(residual + row * residual_stride, c, b);
      a[0] = rounded<T>(a[0] + b[0]);
    } else {
      load<T>(x + row * x_stride, c, a);
    }
    load<T>(weight, c, b);
    a[0] = (HF ? rounded<T>(a[0] * scale) : a[0] * scale) * b[0];
    store<T>(y + row * width, c, a);
  }
}

// ------------------------------------------------------------------------------------------------------- backward

// Group g of `groups` walks rows g, g + groups, ...; the next row is fetched while this one is reduced.
template <class T, int WAVE, int PER, int WAVES, bool ADD, bool HF>
NEOX_KERNEL((Row<T, WAVE, PER, WAVES>::kThreads))
rms_norm_backward(ptr<T> NEOX_RESTRICT dx, ptr<float> NEOX_RESTRICT partial, ptr<const T> NEOX_RESTRICT dy,
                  ptr<const T> NEOX_RESTRICT x, ptr<const T> NEOX_RESTRICT weight, ptr<const float> NEOX_RESTRICT rstd,
                  ptr<const T> NEOX_RESTRICT dsum, int64_t rows, int width, int64_t dy_stride, int64_t x_stride,
                  int64_t dsum_stride, int64_t groups) {
  using Shape = Row<T, WAVE, PER, WAVES>;
  constexpr int VEC = kVector<T>, kWaves = Shape::kThreads / WAVE;
  __shared__ Shared<float, 2 * kWaves> slots;  // two sets, used in turn: one barrier a row
  const uint32_t lane = thread_index() % Shape::kLanes;
  const int64_t group = block_x() * Shape::kRowsPerBlock + wave_uniform(thread_index() / Shape::kLanes);
  const uint32_t last = width - VEC;
  const float inverse_width = 1.0f / static_cast<float>(width);

  uint32_t column[PER];
  Packed w[PER], xv[PER], gv[PER], extra[ADD ? PER : 1];
  float dw[PER][VEC];
  const bool counts = group < groups;  // a last block may hold more groups than there are
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
  const int64_t steps = (rows + groups - 1) / groups;  // the same for every group: barriers stay block-uniform
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t row = step * groups + group;
    const bool live = counts && row < rows;
    const int64_t here = row < rows ? row : rows - 1;
    const int64_t next = row + groups < rows ? row + groups : rows - 1;
    const float r = live ? load_raw<float>(rstd, here) : 0.0f;
    Packed x_next[PER], g_next[PER];
    NEOX_UNROLL
    for (int p = 0; p < PER; ++p) {
      if constexpr (ADD) extra[p] = load_packed<T>(dsum + here * dsum_stride, column[p]);
      x_next[p] = load_packed<T>(x + next * x_stride, column[p]);
      g_next[p] = load_packed<T>(dy + next * dy_stride, column[p]);
    }
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

template <class T, int WAVE, bool ADD>
NEOX_KERNEL(kGenericBlock)
rms_norm_dx_generic(ptr<T> dx, ptr<const T> dy, ptr<const T> x, ptr<const T> weight, ptr<const float> rstd,
                    ptr<const T> dsum, int64_t rows, int width, int64_t dy_stride, int64_t x_stride,
                    int64_t dsum_stride) {
  __shared__ Shared<float, kGenericBlock / WAVE> slots;
  const int64_t row = block_x();
  float dot = 0.0f, a[1], g[1], w[1];
  for (int c = thread_index(); c < width; c += kGenericBlock) {
    load<T>(x + row * x_stride, c, a);
    load<T>(dy + row * dy_stride, c, g);
    load<T>(weight, c, w);
    dot += a[0] * (g[0] * w[0]);
  }
  dot = group_sum<WAVE, kGenericBlock / WAVE>(dot, slots);
  const float r = load_raw<float>(rstd, row), k = dot / static_cast<float>(width) * r * r * r;
  for (int c = thread_index(); c < width; c += kGenericBlock) {
    load<T>(x + row * x_stride, c, a);
    load<T>(dy + row * dy_stride, c, g);
    load<T>(weight, c, w);
    a[0] = r * (g[0] * w[0]) - a[0] * k;
    if constexpr (ADD) {
      load<T>(dsum + row * dsum_stride, c, g);
      a[0] += g[0];
    }
    store<T>(dx + row * width, c, a);
  }
}

// One thread a column; a group of blocks walks rows group, group + groups, ...
template <class T, bool HF>
NEOX_KERNEL(kGenericBlock)
rms_norm_partial_generic(ptr<float> partial, ptr<const T> dy, ptr<const T> x, ptr<const float> rstd, int64_t rows,
                         int width, int64_t dy_stride, int64_t x_stride, int64_t groups) {
  const int64_t group = row_of_block(), c = block_x() * kGenericBlock + thread_index();
  if (c < width) {
    float total = 0.0f, a[1], g[1];
    for (int64_t row = group; row < rows; row += groups) {
      load<T>(x + row * x_stride, c, a);
      load<T>(dy + row * dy_stride, c, g);
      const float xhat = a[0] * load_raw<float>(rstd, row);
      total += (HF ? rounded<T>(xhat) : xhat) * g[0];
    }
    store_raw<float>(partial, group * width + c, total);
  }
}

constexpr int kReduceColumns = 64, kReduceRows = 16;

// Adds the partial rows: 16 threads a column, each over every 16th row, then one sum over the 16 in order.
NEOX_KERNEL(kReduceColumns * kReduceRows)
rms_norm_reduce_partial(ptr<float> NEOX_RESTRICT dweight, ptr<const float> NEOX_RESTRICT partial, int64_t groups,
                        int width) {
  __shared__ Shared<float, kReduceColumns * kReduceRows> sums;
  const int t = thread_index(), lane = t % kReduceColumns, part = t / kReduceColumns;
  const int64_t c = block_x() * kReduceColumns + lane, column = c < width ? c : width - 1;
  float total = 0.0f;
  int64_t row = part;
  for (; row + 3 * kReduceRows < groups; row += 4 * kReduceRows) {
    float v[4];
    NEOX_UNROLL
    for (int i = 0; i < 4; ++i) v[i] = load_raw<float>(partial, (row + i * kReduceRows) * width + column);
    total += (v[0] + v[1]) + (v[2] + v[3]);
  }
  for (; row < groups; row += kReduceRows) total += load_raw<float>(partial, row * width + column);
  sums.set(t, total);
  block_barrier();
  if (part == 0 && c < width) {
    total = 0.0f;
    for (int i = 0; i < kReduceRows; ++i) total += sums.get(i * kReduceColumns + lane);
    store_raw<float>(dweight, c, total);
  }
}

// --------------------------------------------------------------------------------------------------------- choice

// Calls f with the smallest row shape of PER vectors a lane that holds `width`, or returns generic().
template <class T, int WAVE, int PER, int WAVES = 1, class F, class G>
int with_row(int64_t width, F&& f, G&& generic) {
  using Shape = Row<T, WAVE, PER, WAVES>;
  if (width <= Shape::kCapacity) return f(Shape{}, std::integral_constant<int, WAVES>{});
  if constexpr (2 * Shape::kLanes <= 1024) return with_row<T, WAVE, PER, 2 * WAVES>(width, f, generic);
  return generic();
}

template <class T>
bool whole_vectors(int64_t width, std::initializer_list<int64_t> strides, std::initializer_list<const void*> pointers) {
  bool whole = width % kVector<T> == 0;
  for (int64_t stride : strides) whole = whole && stride % kVector<T> == 0;
  for (const void* p : pointers) whole = whole && aligned(p);
  return whole;
}

constexpr int kForwardVectors = 4, kBackwardVectors = 2;
constexpr int64_t kRowsToAmortise = 32;
constexpr int64_t kSmallestGroup = 64;  // for the count of partial rows, which must not depend on the device's wave

int64_t partial_rows(int64_t rows, int64_t width, int vector) {
  // About 1536 waves of 64 in all: at four waves a SIMD they are resident together on the 110 compute units of a GCD.
  // Each has enough rows that writing and reading the partial sums costs little.
  int64_t lanes = kSmallestGroup;
  while (lanes < 1024 && lanes * kBackwardVectors * vector < width) lanes *= 2;
  int64_t groups = 98304 / lanes;
  if (groups > 512) groups = 512;
  int64_t useful = ceil_div(rows, 8);  // few rows: partial sums stay in the cache, parallelism matters more
  if (useful > 128) useful = 128;
  if (useful < rows / kRowsToAmortise) useful = rows / kRowsToAmortise;
  return useful < groups ? (useful < 1 ? 1 : useful) : groups;
}

template <class T>
int forward(void* stream, T* y, float* rstd, T* sum, const T* x, const T* residual, const T* weight, int64_t rows,
            int64_t width, int64_t x_stride, int64_t residual_stride, float eps, bool hf_rounding) {
  return with_wave([&](auto wave) {
    constexpr int WAVE = decltype(wave)::value;
    const auto run = [&](auto add, auto hf) {
      constexpr bool ADD = decltype(add)::value, HF = decltype(hf)::value;
      const auto generic = [&] {
        return NEOX_LAUNCH(stream, rows, kGenericBlock, (rms_norm_forward_generic<T, WAVE, ADD, HF>), y, rstd, sum, x,
                           residual, weight, rows, static_cast<int>(width), x_stride, residual_stride, eps);
      };
      if (!whole_vectors<T>(width, {x_stride, residual_stride}, {y, sum, x, residual, weight})) return generic();
      return with_row<T, WAVE, kForwardVectors>(
          width,
          [&](auto shape, auto waves) {
            using Shape = decltype(shape);
            return NEOX_LAUNCH(stream, ceil_div(rows, Shape::kRowsPerBlock), Shape::kThreads,
                               (rms_norm_forward<T, WAVE, kForwardVectors, decltype(waves)::value, ADD, HF>), y, rstd,
                               sum, x, residual, weight, rows, static_cast<int>(width), x_stride, residual_stride, eps);
          },
          generic);
    };
    const auto with_add = [&](auto hf) {
      return residual ? run(std::true_type{}, hf) : run(std::false_type{}, hf);
    };
    if constexpr (!std::is_same_v<T, float>) {  // in fp32 the two rounding orders are one
      if (hf_rounding) return with_add(std::true_type{});
    }
    return with_add(std::false_type{});
  });
}

template <class T>
int backward(void* stream, T* dx, float* dweight, float* partial, const T* dy, const T* x, const T* weight,
             const float* rstd, const T* dsum, int64_t rows, int64_t width, int64_t dy_stride, int64_t x_stride,
             int64_t dsum_stride, bool hf_rounding) {
  const int64_t groups = partial_rows(rows, width, kVector<T>);
  const int code = with_wave([&](auto wave) {
    constexpr int WAVE = decltype(wave)::value;
    const auto run = [&](auto add, auto hf) {
      constexpr bool ADD = decltype(add)::value, HF = decltype(hf)::value;
      const auto generic = [&] {
        const int code = NEOX_LAUNCH(stream, rows, kGenericBlock, (rms_norm_dx_generic<T, WAVE, ADD>), dx, dy, x,
                                     weight, rstd, dsum, rows, static_cast<int>(width), dy_stride, x_stride, dsum_stride);
        if (code != 0) return code;
        return NEOX_LAUNCH(stream, rows_by(ceil_div(width, kGenericBlock), groups), kGenericBlock,
                           (rms_norm_partial_generic<T, HF>), partial, dy, x, rstd, rows, static_cast<int>(width),
                           dy_stride, x_stride, groups);
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
  return NEOX_LAUNCH(stream, ceil_div(width, kReduceColumns), kReduceColumns * kReduceRows, rms_norm_reduce_partial,
                     dweight, partial, groups, static_cast<int>(width));
}

bool sizes_fit(int64_t rows, int64_t width) { return rows > 0 && width > 0 && width < (int64_t{1} << 30); }

}  // namespace
}  // namespace neox

using namespace neox;

extern "C" int neox_rms_norm_forward(void* stream, int type, void* y, float* rstd, void* sum, const void* x,
                                     const void* residual, const void* weight, int64_t rows, int64_t width,
                                     int64_t x_stride, int64_t residual_stride, float eps, int hf_rounding) {
  if (!sizes_fit(rows, width)) return refuse("rms_norm: rows and width must be positive");
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    return forward(stream, static_cast<T*>(y), rstd, static_cast<T*>(sum), static_cast<const T*>(x),
                   static_cast<const T*>(residual), static_cast<const T*>(weight), rows, width, x_stride,
                   residual_stride, eps, hf_rounding != 0);
  });
}

extern "C" int64_t neox_rms_norm_partial_rows(int type, int64_t rows, int64_t width) {
  return partial_rows(rows, width, type == NEOX_FP32 ? kVector<float> : kVector<bf16>);
}

extern "C" int neox_rms_norm_backward(void* stream, int type, void* dx, float* dweight, float* partial, const void* dy,
                                      const void* x, const void* weight, const float* rstd, const void* dsum,
                                      int64_t rows, int64_t width, int64_t dy_stride, int64_t x_stride,
                                      int64_t dsum_stride, int hf_rounding) {
  if (!sizes_fit(rows, width)) return refuse("rms_norm: rows and width must be positive");
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    return backward(stream, static_cast<T*>(dx), dweight, partial, static_cast<const T*>(dy), static_cast<const T*>(x),
                    static_cast<const T*>(weight), rstd, static_cast<const T*>(dsum), rows, width, dy_stride, x_stride,
                    dsum_stride, hf_rounding != 0);
  });
}

// Forward RMSNorm with optional residual add: one or more waves hold a row in registers; it is read and written once.
#include "norm_rows.h"

namespace neox {
namespace {

constexpr int kForwardVectors = 4;

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
  const int64_t source = live ? row : rows - 1;  // lanes without a row load the last one and store nothing
  const uint32_t last = width - VEC;

  // Load the row and the weight; lanes past the end load the last vector.
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
  // Add and store the rounded sum; accumulate its squares.
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
  // Normalize and store.
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

// Any width, stride and alignment: one block per row, one element per lane, the row read twice.
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
    if constexpr (!std::is_same_v<T, float>) {  // in fp32 both rounding orders are the same
      if (hf_rounding) return with_add(std::true_type{});
    }
    return with_add(std::false_type{});
  });
}

}  // namespace
}  // namespace neox

using namespace neox;

extern "C" int neox_rms_norm_forward(void* stream, int type, void* y, float* rstd, void* sum, const void* x,
                                     const void* residual, const void* weight, int64_t rows, int64_t width,
                                     int64_t x_stride, int64_t residual_stride, float eps, int hf_rounding) {
  if (!sizes_fit(rows, width)) return refuse("rms_norm: rows and width must be positive, width below 2^30");
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    return forward(stream, static_cast<T*>(y), rstd, static_cast<T*>(sum), static_cast<const T*>(x),
                   static_cast<const T*>(residual), static_cast<const T*>(weight), rows, width, x_stride,
                   residual_stride, eps, hf_rounding != 0);
  });
}

// SwiGLU: out = up silu(gate), with up and gate read from the two halves of one projection output.
#include "launch.h"

namespace neox {
namespace {

constexpr int kBlock = 256;
constexpr float kLog2e = 1.4426950408889634f;

// Fast where the result is rounded to 16 bits, expf for fp32.
template <class T>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return 1.0f / (1.0f + expf(-x));
  } else {
    return fast_reciprocal(1.0f + fast_exp2(-kLog2e * x));
  }
}

// One block handles 256 vectors of one row.
template <class T, int VEC>
NEOX_KERNEL(kBlock)
swiglu_forward(ptr<T> NEOX_RESTRICT out, ptr<const T> NEOX_RESTRICT fused, int64_t rows, int64_t width, int64_t stride) {
  const int64_t row = row_of_block(), c = (block_x() * kBlock + thread_index()) * VEC;
  if (row < rows && c < width) {
    float up[VEC], gate[VEC];
    load<T>(fused + row * stride, c, up);
    load<T>(fused + row * stride + width, c, gate);
    NEOX_UNROLL
    for (int i = 0; i < VEC; ++i) up[i] *= gate[i] * sigmoid<T>(gate[i]);
    store<T>(out + row * width, c, up);
  }
}

// dup = dout g s, dgate = dout up s (1 + g (1 - s)) with s = sigmoid(g).
template <class T, int VEC>
NEOX_KERNEL(kBlock)
swiglu_backward(ptr<T> NEOX_RESTRICT dfused, ptr<const T> NEOX_RESTRICT dout, ptr<const T> NEOX_RESTRICT fused,
                int64_t rows, int64_t width, int64_t dout_stride, int64_t stride) {
  const int64_t row = row_of_block(), c = (block_x() * kBlock + thread_index()) * VEC;
  if (row < rows && c < width) {
    float up[VEC], gate[VEC], d[VEC];
    load<T>(fused + row * stride, c, up);
    load<T>(fused + row * stride + width, c, gate);
    load<T>(dout + row * dout_stride, c, d);
    NEOX_UNROLL
    for (int i = 0; i < VEC; ++i) {
      const float s = sigmoid<T>(gate[i]), ds = d[i] * s;
      const float dgate = ds * up[i] * (1.0f + gate[i] * (1.0f - s));
      up[i] = ds * gate[i];
      gate[i] = dgate;
    }
    store<T>(dfused + row * 2 * width, c, up);
    store<T>(dfused + row * 2 * width + width, c, gate);
  }
}

template <class T, class F>
int with_vector(bool whole, int64_t rows, int64_t width, F&& f) {
  const auto run = [&](auto vector) {
    return f(vector, rows_by(ceil_div(width, kBlock * decltype(vector)::value), rows));
  };
  return whole ? run(std::integral_constant<int, kVector<T>>{}) : run(std::integral_constant<int, 1>{});
}

}  // namespace
}  // namespace neox

using namespace neox;

extern "C" int neox_swiglu_forward(void* stream, int type, void* out, const void* fused, int64_t rows, int64_t width,
                                   int64_t fused_stride) {
  if (rows <= 0 || width <= 0) return refuse("swiglu: rows and width must be positive");
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    const bool whole = width % kVector<T> == 0 && fused_stride % kVector<T> == 0 && aligned(out) && aligned(fused);
    return with_vector<T>(whole, rows, width, [&](auto vector, Grid grid) {
      return NEOX_LAUNCH(stream, grid, kBlock, (swiglu_forward<T, decltype(vector)::value>), static_cast<T*>(out),
                         static_cast<const T*>(fused), rows, width, fused_stride);
    });
  });
}

extern "C" int neox_swiglu_backward(void* stream, int type, void* dfused, const void* dout, const void* fused,
                                    int64_t rows, int64_t width, int64_t dout_stride, int64_t fused_stride) {
  if (rows <= 0 || width <= 0) return refuse("swiglu: rows and width must be positive");
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    const bool whole = width % kVector<T> == 0 && fused_stride % kVector<T> == 0 && dout_stride % kVector<T> == 0 &&
                       aligned(dfused) && aligned(dout) && aligned(fused);
    return with_vector<T>(whole, rows, width, [&](auto vector, Grid grid) {
      return NEOX_LAUNCH(stream, grid, kBlock, (swiglu_backward<T, decltype(vector)::value>),
                         static_cast<T*>(dfused), static_cast<const T*>(dout), static_cast<const T*>(fused), rows,
                         width, dout_stride, fused_stride);
    });
  });
}

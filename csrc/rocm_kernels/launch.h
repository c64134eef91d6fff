// Host side of a launch, common to all back ends: errors, wave size, grid.
#pragma once

#include <string>

#include "kernels.h"
#include "platform.h"

namespace neox {

std::string& last_error();

// The blocks of a launch are a number, or rows_by(chunks, rows).
#if defined(NEOX_HOST_EMULATOR)

using Grid = emulator::Grid;

#define NEOX_LAUNCH(stream, blocks, threads, kernel, ...) \
  (static_cast<void>(stream), ::neox::finish(emulator::launch(blocks, (threads), [&] { kernel(__VA_ARGS__); })))

inline int finish(int code) {
  if (code != 0) last_error() = emulator::machine().error;
  return code;
}

template <class F>
int with_wave(F&& f) {
  return emulator::machine().wave == 64 ? f(std::integral_constant<int, 64>{}) : f(std::integral_constant<int, 32>{});
}

#else

using Grid = dim3;

inline dim3 as_grid(dim3 grid) { return grid; }
inline dim3 as_grid(int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); }

#if defined(__HIP__)
using Stream = hipStream_t;
inline const char* launch_error() {
  const hipError_t error = hipGetLastError();
  return error == hipSuccess ? nullptr : hipGetErrorString(error);
}
#else
using Stream = cudaStream_t;
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

#define NEOX_LAUNCH(stream, blocks, threads, kernel, ...)                                      \
  (kernel<<<::neox::as_grid(blocks), dim3(static_cast<unsigned>(threads)), 0,      \
            static_cast<::neox::Stream>(stream)>>>(__VA_ARGS__),                               \
   ::neox::finish(::neox::launch_error()))

inline int finish(const char* error) {
  if (error == nullptr) return 0;
  last_error() = error;
  return 1;
}

// The wave size is fixed at build time; neox_wave_size() lets the caller compare it with the device's.
template <class F>
int with_wave(F&& f) {
  return f(std::integral_constant<int, NEOX_WAVE>{});
}

#endif

inline int refuse(const std::string& why) {
  last_error() = why;
  return 1;
}

// Calls f with a value of the element type.
template <class F>
int with_type(int type, F&& f) {
  switch (type) {
    case NEOX_BF16: return f(bf16{});
    case NEOX_FP16: return f(fp16{});
    case NEOX_FP32: return f(float{});
  }
  return refuse("element type " + std::to_string(type) + " is not bf16, fp16 or fp32");
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// `chunks` blocks for each row, without a division in the kernel: the chunk is block_x(), the row is row_of_block().
// A grid has at most 65,535 blocks in y and in z.
constexpr int64_t kRowsPerPlane = 1 << 15;

inline Grid rows_by(int64_t chunks, int64_t rows) {
  const int64_t y = rows < kRowsPerPlane ? rows : kRowsPerPlane;
  return Grid(chunks, y, (rows + kRowsPerPlane - 1) / kRowsPerPlane);
}

__device__ __forceinline__ int64_t row_of_block() { return block_z() * kRowsPerPlane + block_y(); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace neox

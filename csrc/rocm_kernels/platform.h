// Platform layer: one kernel source for AMD (hipcc), NVIDIA (nvcc) and the host emulator (g++).
//
// No torch header, no vendor bf16 header: 16-bit elements are raw words, so that all platforms give the same bits.
// Lanes per wave are a template parameter of the kernels that depend on them, chosen at launch by with_wave().
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(NEOX_HOST_EMULATOR)
#include "host/emulator.h"
#define NEOX_RESTRICT
#define NEOX_KERNEL(threads) inline void
#define NEOX_UNROLL
#elif defined(__HIP__)
#include <hip/hip_runtime.h>
#elif defined(__CUDACC__)
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#error "compile with hipcc (HIP_PLATFORM=amd), nvcc, or g++ -DNEOX_HOST_EMULATOR"
#endif

#if defined(__HIP__) && !__has_builtin(__builtin_amdgcn_exp2f)
extern "C" __device__ __attribute__((const)) float __ocml_native_exp2_f32(float);  // clang 15: the same v_exp_f32
#endif

#if !defined(NEOX_HOST_EMULATOR)
#define NEOX_RESTRICT __restrict__
// One argument only: the second means waves per SIMD in HIP and blocks per multiprocessor in CUDA.
#define NEOX_KERNEL(threads) __global__ void __launch_bounds__(threads)
#define NEOX_UNROLL _Pragma("unroll")
#endif

namespace neox {

// ---------------------------------------------------------------------------------------------------- the machine

#if !defined(NEOX_HOST_EMULATOR)

template <class T>
using ptr = T*;

template <class T, int N>
struct Shared {
  T data[N];
  __device__ __forceinline__ T get(int i) const { return data[i]; }
  __device__ __forceinline__ void set(int i, T value) { data[i] = value; }
};

__device__ __forceinline__ int thread_index() { return threadIdx.x; }
__device__ __forceinline__ int64_t block_x() { return blockIdx.x; }
__device__ __forceinline__ int64_t block_y() { return blockIdx.y; }
__device__ __forceinline__ int64_t block_z() { return blockIdx.z; }
__device__ __forceinline__ void block_barrier() { __syncthreads(); }

// Every lane of the wave must call it.
template <int WAVE>
__device__ __forceinline__ float shuffle_xor(float value, int mask) {
#if defined(__HIP__)
  return __shfl_xor(value, mask, WAVE);
#else
  return __shfl_xor_sync(~0u, value, mask, WAVE);
#endif
}

#endif

// Tells the compiler that a value is the same in all lanes of a wave: on AMD the value, and every address derived from
// it, then stay in scalar registers.
__device__ __forceinline__ int wave_uniform(int value) {
#if defined(__HIP__)
  return __builtin_amdgcn_readfirstlane(value);
#else
  return value;
#endif
}

// ------------------------------------------------------------------------------------------------ fast arithmetic
// Accurate to an ulp or two, denormals flushed: used where the result is rounded to 16 bits.

__device__ __forceinline__ float fast_exp2(float x) {
#if defined(NEOX_HOST_EMULATOR)
  return std::exp2(x);
#elif defined(__HIP__)
#if __has_builtin(__builtin_amdgcn_exp2f)
  return __builtin_amdgcn_exp2f(x);
#else
  return __ocml_native_exp2_f32(x);
#endif
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

__device__ __forceinline__ float fast_reciprocal(float x) {
#if defined(NEOX_HOST_EMULATOR)
  return 1.0f / x;
#elif defined(__HIP__)
  return __builtin_amdgcn_rcpf(x);
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// ------------------------------------------------------------------------------------------------------- elements

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

struct alignas(16) Packed {
  uint32_t word[4];
};

template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ float bits_to_float(uint32_t bits) {
#if defined(NEOX_HOST_EMULATOR)
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#else
  return __builtin_bit_cast(float, bits);
#endif
}

__device__ __forceinline__ uint32_t float_to_bits(float value) {
#if defined(NEOX_HOST_EMULATOR)
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
#else
  return __builtin_bit_cast(uint32_t, value);
#endif
}

template <class T>
struct Element;

template <>
struct Element<float> {
  static __device__ __forceinline__ float widen(float x) { return x; }
  static __device__ __forceinline__ float narrow(float x) { return x; }
};

template <>
struct Element<bf16> {
  static __device__ __forceinline__ float widen(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
  static __device__ __forceinline__ bf16 narrow(float x) { return bf16{static_cast<uint16_t>(narrow_pair(x, 0.0f))}; }
  static __device__ __forceinline__ void widen_pair(uint32_t word, float& low, float& high) {
    low = bits_to_float(word << 16);
    high = bits_to_float(word & ~0xffffu);
  }
  // Round to nearest even. Hardware NaNs keep their top payload bit, which the integer rounding cannot carry out of;
  // NVIDIA's canonical NaN is all ones and would wrap to -0, hence the instruction there.
  static __device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
#if defined(__CUDACC__)
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    uint32_t a = float_to_bits(low), b = float_to_bits(high);
    a += 0x7fffu + ((a >> 16) & 1u);
    b += 0x7fffu + ((b >> 16) & 1u);
#if defined(__HIP__)
    return __builtin_amdgcn_perm(b, a, 0x07060302u);
#else
    return (b & ~0xffffu) | (a >> 16);
#endif
#endif
  }
};

#if defined(NEOX_HOST_EMULATOR)
inline float widen_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 0x1fu, fraction = h & 0x3ffu;
  if (exponent == 0x1f) return bits_to_float(sign | 0x7f800000u | (fraction << 13));
  if (exponent == 0) return bits_to_float(sign | float_to_bits(static_cast<float>(fraction) * 0x1p-24f));
  return bits_to_float(sign | ((exponent + 112) << 23) | (fraction << 13));
}
inline uint16_t narrow_half(float x) {
  const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds past 65504
  if (rest < 0x38800000u)  // a subnormal half: its unit is 2^-24, and rint rounds to even
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::rint(bits_to_float(rest) * 0x1p24f)));
  const uint32_t rounded = rest + 0xfffu + ((rest >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}
#endif

template <>
struct Element<fp16> {
  static __device__ __forceinline__ float widen(fp16 x) {
#if defined(NEOX_HOST_EMULATOR)
    return widen_half(x.bits);
#elif defined(__HIP__)
    return static_cast<float>(__builtin_bit_cast(_Float16, x.bits));
#else
    return __half2float(__ushort_as_half(x.bits));
#endif
  }
  static __device__ __forceinline__ fp16 narrow(float x) {
#if defined(NEOX_HOST_EMULATOR)
    return fp16{narrow_half(x)};
#elif defined(__HIP__)
    return fp16{__builtin_bit_cast(uint16_t, static_cast<_Float16>(x))};
#else
    return fp16{__half_as_ushort(__float2half_rn(x))};
#endif
  }
  static __device__ __forceinline__ void widen_pair(uint32_t word, float& low, float& high) {
    low = widen(fp16{static_cast<uint16_t>(word)});
    high = widen(fp16{static_cast<uint16_t>(word >> 16)});
  }
  static __device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
    return narrow(low).bits | (static_cast<uint32_t>(narrow(high).bits) << 16);
  }
};

// x rounded to T and back.
template <class T>
__device__ __forceinline__ float rounded(float x) {
  return Element<T>::widen(Element<T>::narrow(x));
}

template <class T>
__device__ __forceinline__ void unpack(const Packed& packed, float (&x)[kVector<T>]) {
  NEOX_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      x[i] = bits_to_float(packed.word[i]);
    } else {
      Element<T>::widen_pair(packed.word[i], x[2 * i], x[2 * i + 1]);
    }
  }
}

template <class T>
__device__ __forceinline__ Packed pack(const float (&x)[kVector<T>]) {
  Packed packed;
  NEOX_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      packed.word[i] = float_to_bits(x[i]);
    } else {
      packed.word[i] = Element<T>::narrow_pair(x[2 * i], x[2 * i + 1]);
    }
  }
  return packed;
}

// Makes the compiler unpack these words again at the next use. It would otherwise keep the fp32 values in registers,
// two to four times as many, which lowers occupancy.
__device__ __forceinline__ void forget_unpacked(Packed& packed) {
#if defined(__HIP__) && defined(__HIP_DEVICE_COMPILE__)
  NEOX_UNROLL
  for (int i = 0; i < 4; ++i) asm volatile("" : "+v"(packed.word[i]));
#elif defined(__CUDA_ARCH__)
  NEOX_UNROLL
  for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(packed.word[i]));
#else
  static_cast<void>(packed);
#endif
}

// ---------------------------------------------------------------------------------------------- loads and stores
// Indices count elements. A Packed access must be aligned to 16 bytes; launchers choose the scalar kernel otherwise.

template <class T>
__device__ __forceinline__ T load_raw(ptr<const T> p, int64_t i) {
#if defined(NEOX_HOST_EMULATOR)
  emulator::check((p + i).raw(), sizeof(T), false);
  return *(p + i).raw();
#else
  return p[i];
#endif
}

template <class T>
__device__ __forceinline__ void store_raw(ptr<T> p, int64_t i, T value) {
#if defined(NEOX_HOST_EMULATOR)
  emulator::check((p + i).raw(), sizeof(T), true);
  *(p + i).raw() = value;
#else
  p[i] = value;
#endif
}

template <class T>
__device__ __forceinline__ Packed load_packed(ptr<const T> p, int64_t i) {
#if defined(NEOX_HOST_EMULATOR)
  emulator::check((p + i).raw(), 16, false);
  Packed packed;
  std::memcpy(&packed, (p + i).raw(), 16);
  return packed;
#elif defined(__HIP__)
  typedef uint32_t Words __attribute__((ext_vector_type(4)));
  const Words w = *reinterpret_cast<const Words*>(p + i);
  return Packed{{w.x, w.y, w.z, w.w}};
#else
  const uint4 w = *reinterpret_cast<const uint4*>(p + i);
  return Packed{{w.x, w.y, w.z, w.w}};
#endif
}

// Streaming store: the outputs are larger than the caches, and must not evict what will be read again.
template <class T>
__device__ __forceinline__ void store_packed(ptr<T> p, int64_t i, const Packed& v) {
#if defined(NEOX_HOST_EMULATOR)
  emulator::check((p + i).raw(), 16, true);
  std::memcpy((p + i).raw(), &v, 16);
#elif defined(__HIP__)
  typedef uint32_t Words __attribute__((ext_vector_type(4)));
  const Words w = {v.word[0], v.word[1], v.word[2], v.word[3]};
  __builtin_nontemporal_store(w, reinterpret_cast<Words*>(p + i));
#else
  __stcs(reinterpret_cast<uint4*>(p + i), make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]));
#endif
}

// Loads VEC elements into a lane: one 16-byte access where VEC is a whole vector, one element where VEC is 1.
template <class T, int VEC>
__device__ __forceinline__ void load(ptr<const T> p, int64_t i, float (&x)[VEC]) {
  if constexpr (VEC == 1) {
    x[0] = Element<T>::widen(load_raw<T>(p, i));
  } else if constexpr (VEC == kVector<T>) {
    unpack<T>(load_packed<T>(p, i), x);
  } else {  // fp32 tables used with 16-bit data: two vectors
    static_assert(VEC == 2 * kVector<T>);
    float low[kVector<T>], high[kVector<T>];
    load<T>(p, i, low);
    load<T>(p, i + kVector<T>, high);
    NEOX_UNROLL
    for (int j = 0; j < kVector<T>; ++j) x[j] = low[j], x[j + kVector<T>] = high[j];
  }
}

template <class T, int VEC>
__device__ __forceinline__ void store(ptr<T> p, int64_t i, const float (&x)[VEC]) {
  if constexpr (VEC == 1) {
    store_raw<T>(p, i, Element<T>::narrow(x[0]));
  } else {
    store_packed<T>(p, i, pack<T>(x));
  }
}

// ----------------------------------------------------------------------------------------------------- reductions

template <int WAVE>
__device__ __forceinline__ float wave_sum(float x) {
  NEOX_UNROLL
  for (int mask = WAVE / 2; mask > 0; mask /= 2) x += shuffle_xor<WAVE>(x, mask);
  return x;
}

template <int WAVE>
__device__ __forceinline__ float wave_max(float x) {
  NEOX_UNROLL
  for (int mask = WAVE / 2; mask > 0; mask /= 2) {
    const float other = shuffle_xor<WAVE>(x, mask);
    x = x > other ? x : other;
  }
  return x;
}

// Sum over GROUP consecutive waves of the block, in a fixed order, returned to all their lanes. `slots` holds one float
// per wave; two calls need a barrier between them or different slots. Every thread of the block must call it.
template <int WAVE, int GROUP, int N>
__device__ __forceinline__ float group_sum(float x, Shared<float, N>& slots, int offset = 0) {
  x = wave_sum<WAVE>(x);
  if constexpr (GROUP > 1) {
    const int wave = thread_index() / WAVE;
    if (thread_index() % WAVE == 0) slots.set(offset + wave, x);
    block_barrier();
    x = 0.0f;
    NEOX_UNROLL
    for (int i = 0; i < GROUP; ++i) x += slots.get(offset + wave / GROUP * GROUP + i);
  }
  return x;
}

}  // namespace neox

// How rows are distributed over registers, for the forward and backward kernels of the norm.
#pragma once

#include "launch.h"

namespace neox {

constexpr int kBlock = 256;
constexpr int kGenericBlock = 256;
constexpr int kMostLanes = 1024;  // per row, and per block

// A row held as `PER` vectors in each lane of `WAVES` waves.
template <class T, int WAVE, int PER, int WAVES>
struct Row {
  static constexpr int kLanes = WAVE * WAVES;
  static constexpr int kThreads = kLanes > kBlock ? kLanes : kBlock;
  static constexpr int kRowsPerBlock = kThreads / kLanes;
  static constexpr int64_t kCapacity = static_cast<int64_t>(kLanes) * PER * kVector<T>;
};

// Calls f with the smallest row shape of PER vectors per lane that holds `width`; generic() if there is none.
template <class T, int WAVE, int PER, int WAVES = 1, class F, class G>
int with_row(int64_t width, F&& f, G&& generic) {
  using Shape = Row<T, WAVE, PER, WAVES>;
  if (width <= Shape::kCapacity) return f(Shape{}, std::integral_constant<int, WAVES>{});
  if constexpr (2 * Shape::kLanes <= kMostLanes) return with_row<T, WAVE, PER, 2 * WAVES>(width, f, generic);
  return generic();
}

template <class T>
bool whole_vectors(int64_t width, std::initializer_list<int64_t> strides, std::initializer_list<const void*> pointers) {
  bool whole = width % kVector<T> == 0;
  for (int64_t stride : strides) whole = whole && stride % kVector<T> == 0;
  for (const void* p : pointers) whole = whole && aligned(p);
  return whole;
}

inline bool sizes_fit(int64_t rows, int64_t width) { return rows > 0 && width > 0 && width < (int64_t{1} << 30); }

}  // namespace neox

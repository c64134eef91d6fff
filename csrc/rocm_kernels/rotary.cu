// Half-split rotary embedding of q and k, read in place from the packed projection.
#include "launch.h"

namespace neox {
namespace {

constexpr int kBlock = 256;
constexpr int kMaxSlotsPerToken = 8;
constexpr int kHeadsAtOnce = 2;  // loads in flight per thread: one is half of what keeps an H200 busy

struct Strides {
  int64_t s, b, head;
};

// A thread owns VEC elements of a head and their partners half a head further, in every `slots`-th of one token's q and
// k heads; the token's cosines and sines stay in registers. `lanes` adjacent threads cover a head.
template <class T, int VEC>
NEOX_KERNEL(kBlock)
rotary(ptr<T> NEOX_RESTRICT q_out, ptr<T> NEOX_RESTRICT k_out, ptr<const T> NEOX_RESTRICT q,
       ptr<const T> NEOX_RESTRICT k, ptr<const float> NEOX_RESTRICT cos, ptr<const float> NEOX_RESTRICT sin,
       ptr<const int64_t> NEOX_RESTRICT positions, int64_t s, int64_t b, int q_heads, int k_heads, int half, Strides q_in,
       Strides k_in, int64_t position_s, int64_t position_b, int lanes, int slots, float sign) {
  const int tokens_per_block = kBlock / (lanes * slots);
  const int lane = thread_index() % lanes, group = thread_index() / lanes;
  const int64_t is = block_x() * tokens_per_block + group / slots, ib = row_of_block();
  if (group / slots < tokens_per_block && is < s && ib < b) {
    const int64_t position = positions ? load_raw<int64_t>(positions, is * position_s + ib * position_b) : is;
    const int c = lane * VEC, heads = q_heads + k_heads;
    const int q_step = static_cast<int>(q_in.head), k_step = static_cast<int>(k_in.head);
    // The pointers into k are moved back by the q heads, so that one index h counts the heads of q and k.
    const ptr<const T> q_from = q + (is * q_in.s + ib * q_in.b + c);
    const ptr<const T> k_from = k + (is * k_in.s + ib * k_in.b + c - q_heads * k_step);
    const ptr<T> q_to = q_out + ((is * b + ib) * q_heads * 2 * half + c);
    const ptr<T> k_to = k_out + (((is * b + ib) * k_heads - q_heads) * 2 * half + c);
    float cs[VEC], sn[VEC];
    load<float>(cos + position * half, c, cs);
    load<float>(sin + position * half, c, sn);
    NEOX_UNROLL
    for (int i = 0; i < VEC; ++i) sn[i] *= sign;
    for (int first = group % slots; first < heads; first += kHeadsAtOnce * slots) {
      float x1[kHeadsAtOnce][VEC], x2[kHeadsAtOnce][VEC];
      NEOX_UNROLL
      for (int u = 0; u < kHeadsAtOnce; ++u) {
        const int h = first + u * slots < heads ? first + u * slots : first;  // past the end: load `first` again
        const ptr<const T> from = (h < q_heads ? q_from : k_from) + h * (h < q_heads ? q_step : k_step);
        load<T>(from, 0, x1[u]);
        load<T>(from, half, x2[u]);
      }
      NEOX_UNROLL
      for (int u = 0; u < kHeadsAtOnce; ++u) {
        const int h = first + u * slots;
        float y1[VEC], y2[VEC];
        NEOX_UNROLL
        for (int i = 0; i < VEC; ++i) {
          y1[i] = x1[u][i] * cs[i] - x2[u][i] * sn[i];
          y2[i] = x2[u][i] * cs[i] + x1[u][i] * sn[i];
        }
        if (h < heads) {
          const ptr<T> to = (h < q_heads ? q_to : k_to) + h * 2 * half;
          store<T>(to, 0, y1);
          store<T>(to, half, y2);
        }
      }
    }
  }
}

template <class T, int VEC>
int launch(void* stream, T* q_out, T* k_out, const T* q, const T* k, const float* cos, const float* sin,
           const int64_t* positions, int64_t s, int64_t b, int64_t q_heads, int64_t k_heads, int64_t half, Strides q_in,
           Strides k_in, int64_t position_s, int64_t position_b, float sign) {
  const int64_t lanes = half / VEC, heads = q_heads + k_heads;
  if (lanes > kBlock) return refuse("rotary: a head of " + std::to_string(2 * half) + " elements is too wide");
  int64_t slots = 1;
  while (2 * slots <= heads && 2 * slots <= kMaxSlotsPerToken && 2 * slots * lanes <= kBlock) slots *= 2;
  return NEOX_LAUNCH(stream, rows_by(ceil_div(s, kBlock / (lanes * slots)), b), kBlock, (rotary<T, VEC>), q_out, k_out,
                     q, k, cos, sin, positions, s, b, static_cast<int>(q_heads), static_cast<int>(k_heads),
                     static_cast<int>(half), q_in, k_in, position_s, position_b, static_cast<int>(lanes),
                     static_cast<int>(slots), sign);
}

}  // namespace
}  // namespace neox

using namespace neox;

extern "C" int neox_rotary(void* stream, int type, void* q_out, void* k_out, const void* q, const void* k,
                           const float* cos, const float* sin, const int64_t* positions, int64_t s, int64_t b,
                           int64_t q_heads, int64_t k_heads, int64_t d, const int64_t q_strides[3],
                           const int64_t k_strides[3], const int64_t position_strides[2], int conjugate) {
  if (s <= 0 || b <= 0 || q_heads <= 0 || d <= 0 || d % 2 != 0)
    return refuse("rotary: sizes must be positive and a head made of two halves");
  for (const int64_t step : {q_strides[2], k_strides[2], d})
    if (step * (q_heads + k_heads) >= int64_t{1} << 30) return refuse("rotary: the heads of one token are too far apart");
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    const int64_t half = d / 2;
    bool whole = half % kVector<T> == 0 && aligned(q) && aligned(k) && aligned(q_out) && aligned(k_out) &&
                 aligned(cos) && aligned(sin);
    for (int i = 0; i < 3; ++i) whole = whole && q_strides[i] % kVector<T> == 0 && k_strides[i] % kVector<T> == 0;
    const auto as = [](const int64_t* v) { return Strides{v[0], v[1], v[2]}; };
    const auto run = [&](auto vector) {
      return launch<T, decltype(vector)::value>(
          stream, static_cast<T*>(q_out), static_cast<T*>(k_out), static_cast<const T*>(q), static_cast<const T*>(k),
          cos, sin, positions, s, b, q_heads, k_heads, half, as(q_strides), as(k_strides),
          positions ? position_strides[1] : 0, positions ? position_strides[0] : 0, conjugate ? -1.0f : 1.0f);
    };
    return whole ? run(std::integral_constant<int, kVector<T>>{}) : run(std::integral_constant<int, 1>{});
  });
}

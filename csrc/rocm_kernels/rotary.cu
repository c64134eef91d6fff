// Rotary embedding, half-split, on q and k where they lie in the packed projection.
#include "launch.h"

namespace neox {
namespace {

constexpr int kBlock = 256;
constexpr int kMaxSlotsPerToken = 8;

struct Strides {
  int64_t s, b, head;
};

// Every `slots`-th head of one token from `slot` on, elements c.. and half + c..
template <class T, int VEC>
__device__ __forceinline__ void turn_heads(ptr<T> out, ptr<const T> in, int slot, int slots, int heads, int64_t in_step,
                                           int64_t out_step, int c, int half, int d, int lanes, const float (&cs)[VEC],
                                           const float (&sn)[VEC]) {
  ptr<const T> from = in + slot * in_step;
  ptr<T> to = out + slot * out_step;
  for (int h = slot; h < heads; h += slots) {
    float x1[VEC], x2[VEC], y1[VEC], y2[VEC];
    load<T>(from, c, x1);
    load<T>(from, c + half, x2);
    NEOX_UNROLL
    for (int i = 0; i < VEC; ++i) {
      y1[i] = x1[i] * cs[i] - x2[i] * sn[i];
      y2[i] = x2[i] * cs[i] + x1[i] * sn[i];
    }
    store<T>(to, c, y1);
    store<T>(to, c + half, y2);
    for (int rest = 2 * half + c; rest < d; rest += lanes * VEC) {  // partial rotary
      load<T>(from, rest, x1);
      store<T>(to, rest, x1);
    }
    from = from + slots * in_step;
    to = to + slots * out_step;
  }
}

// A thread owns VEC elements of a head and their partners half a head on, for every `slots`-th head of one token; the
// token's cosines and sines stay in its registers. `lanes` threads side by side cover a head.
template <class T, int VEC>
NEOX_KERNEL(kBlock)
rotary(ptr<T> q_out, ptr<T> k_out, ptr<const T> q, ptr<const T> k, ptr<const float> NEOX_RESTRICT cos,
       ptr<const float> NEOX_RESTRICT sin, ptr<const int64_t> NEOX_RESTRICT positions, int64_t s, int64_t b,
       int q_heads, int k_heads, int d, int half, Strides q_in, Strides k_in, Strides q_to, Strides k_to,
       int64_t position_s, int64_t position_b, int lanes, int slots, float sign) {
  const int tokens_per_block = kBlock / (lanes * slots);
  const int lane = thread_index() % lanes, group = thread_index() / lanes;
  const int slot = group % slots;
  const int64_t is = block_x() * tokens_per_block + group / slots, ib = row_of_block();
  if (group / slots < tokens_per_block && is < s && ib < b) {
    const int64_t position = positions ? load_raw<int64_t>(positions, is * position_s + ib * position_b) : is;
    const int c = lane * VEC;
    float cs[VEC], sn[VEC];
    load<float>(cos + position * half, c, cs);
    load<float>(sin + position * half, c, sn);
    NEOX_UNROLL
    for (int i = 0; i < VEC; ++i) sn[i] *= sign;
    turn_heads<T, VEC>(q_out + (is * q_to.s + ib * q_to.b), q + (is * q_in.s + ib * q_in.b), slot, slots, q_heads,
                       q_in.head, q_to.head, c, half, d, lanes, cs, sn);
    turn_heads<T, VEC>(k_out + (is * k_to.s + ib * k_to.b), k + (is * k_in.s + ib * k_in.b), slot, slots, k_heads,
                       k_in.head, k_to.head, c, half, d, lanes, cs, sn);
  }
}

template <class T, int VEC>
int launch(void* stream, T* q_out, T* k_out, const T* q, const T* k, const float* cos, const float* sin,
           const int64_t* positions, int64_t s, int64_t b, int64_t q_heads, int64_t k_heads, int64_t d, int64_t half,
           Strides q_in, Strides k_in, Strides q_to, Strides k_to, int64_t position_s, int64_t position_b, float sign) {
  const int64_t lanes = half / VEC;
  if (lanes > kBlock) return refuse("rotary: a head of " + std::to_string(d) + " elements is too wide");
  int64_t slots = 1;
  while (2 * slots <= q_heads + k_heads && 2 * slots <= kMaxSlotsPerToken && 2 * slots * lanes <= kBlock) slots *= 2;
  return NEOX_LAUNCH(stream, rows_by(ceil_div(s, kBlock / (lanes * slots)), b), kBlock, (rotary<T, VEC>), q_out, k_out, q, k, cos,
                     sin, positions, s, b, static_cast<int>(q_heads), static_cast<int>(k_heads), static_cast<int>(d),
                     static_cast<int>(half), q_in, k_in, q_to, k_to, position_s, position_b, static_cast<int>(lanes),
                     static_cast<int>(slots), sign);
}

}  // namespace
}  // namespace neox

using namespace neox;

extern "C" int neox_rotary(void* stream, int type, void* q_out, void* k_out, const void* q, const void* k,
                           const float* cos, const float* sin, const int64_t* positions, int64_t s, int64_t b,
                           int64_t q_heads, int64_t k_heads, int64_t d, int64_t half, const int64_t q_strides[3],
                           const int64_t k_strides[3], const int64_t q_out_strides[3], const int64_t k_out_strides[3],
                           const int64_t position_strides[2], int conjugate) {
  if (s <= 0 || b <= 0 || q_heads <= 0 || half <= 0 || 2 * half > d)
    return refuse("rotary: sizes must be positive and the rotated part must fit a head");
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    const int64_t* all[] = {q_strides, k_strides, q_out_strides, k_out_strides};
    bool whole = half % kVector<T> == 0 && d % kVector<T> == 0 && aligned(q) && aligned(k) && aligned(q_out) &&
                 aligned(k_out) && aligned(cos) && aligned(sin);
    for (const int64_t* strides : all)
      for (int i = 0; i < 3; ++i) whole = whole && strides[i] % kVector<T> == 0;
    const auto as = [](const int64_t* v) { return Strides{v[0], v[1], v[2]}; };
    const auto run = [&](auto vector) {
      return launch<T, decltype(vector)::value>(
          stream, static_cast<T*>(q_out), static_cast<T*>(k_out), static_cast<const T*>(q), static_cast<const T*>(k),
          cos, sin, positions, s, b, q_heads, k_heads, d, half, as(q_strides), as(k_strides), as(q_out_strides),
          as(k_out_strides), positions ? position_strides[1] : 0, positions ? position_strides[0] : 0,
          conjugate ? -1.0f : 1.0f);
    };
    return whole ? run(std::integral_constant<int, kVector<T>>{}) : run(std::integral_constant<int, 1>{});
  });
}

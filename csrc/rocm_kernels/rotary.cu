// Rotary embedding, half-split, on q and k where they lie in the packed projection.
#include "launch.h"

namespace neox {
namespace {

constexpr int kBlock = 256;
constexpr int kMaxSlotsPerToken = 8;

struct Strides {
  int64_t s, b, head;
};

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
  const int64_t token = block_index() * tokens_per_block + group / slots;
  if (group / slots < tokens_per_block && token < s * b) {
    const int64_t is = token / b, ib = token % b;
    const int64_t position = positions ? load_raw<int64_t>(positions, is * position_s + ib * position_b) : is;
    const int c = lane * VEC;
    float cs[VEC], sn[VEC];
    load<float>(cos + position * half, c, cs);
    load<float>(sin + position * half, c, sn);
    for (int h = slot; h < q_heads + k_heads; h += slots) {
      const bool is_q = h < q_heads;
      const Strides from = is_q ? q_in : k_in, to = is_q ? q_to : k_to;
      const int64_t head = is_q ? h : h - q_heads;
      const ptr<const T> in = (is_q ? q : k) + (is * from.s + ib * from.b + head * from.head);
      const ptr<T> out = (is_q ? q_out : k_out) + (is * to.s + ib * to.b + head * to.head);
      float x1[VEC], x2[VEC], y1[VEC], y2[VEC];
      load<T>(in, c, x1);
      load<T>(in, c + half, x2);
      NEOX_UNROLL
      for (int i = 0; i < VEC; ++i) {
        y1[i] = x1[i] * cs[i] - sign * sn[i] * x2[i];
        y2[i] = x2[i] * cs[i] + sign * sn[i] * x1[i];
      }
      store<T>(out, c, y1);
      store<T>(out, c + half, y2);
      for (int rest = 2 * half + c; rest < d; rest += lanes * VEC) {  // partial rotary
        load<T>(in, rest, x1);
        store<T>(out, rest, x1);
      }
    }
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
  return NEOX_LAUNCH(stream, ceil_div(s * b, kBlock / (lanes * slots)), kBlock, (rotary<T, VEC>), q_out, k_out, q, k, cos,
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

// Kernels with one fault each, for test_emulator.py: `faulty_kernels CASE WAVE` prints what the emulator says.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "launch.h"

namespace neox {
std::string& last_error() {
  static std::string error;
  return error;
}
}  // namespace neox

using namespace neox;

constexpr int kThreads = 128;

template <int WAVE>
void kernel(const char* fault, ptr<float> out, ptr<const float> in) {
  __shared__ Shared<float, kThreads> slots;
  const auto is = [&](const char* name) { return std::strcmp(fault, name) == 0; };
  const int t = thread_index();
  float x = load_raw<float>(in, t);
  if (is("none")) {
    x = wave_sum<WAVE>(x);
    if (t % WAVE == 0) slots.set(t / WAVE, x);
    block_barrier();
    x = 0.0f;
    for (int i = 0; i < kThreads / WAVE; ++i) x += slots.get(i);
  }
  if (is("shuffle in half a wave") && t % WAVE < WAVE / 2) x = shuffle_xor<WAVE>(x, 1);
  if (is("shuffle after an early return")) {
    if (t % WAVE == 3) return;
    x = wave_sum<WAVE>(x);
  }
  if (is("different shuffles")) {
    if (t % WAVE == 0) {
      x = shuffle_xor<WAVE>(shuffle_xor<WAVE>(x, 1), 1);
    } else {
      x = shuffle_xor<WAVE>(x, 1);
    }
  }
  if (is("shuffle beyond the wave")) x = shuffle_xor<WAVE>(x, WAVE);
  if (is("barrier in one wave") && t < WAVE) block_barrier();
  if (is("barrier against shuffle")) {
    if (t % WAVE == 0) block_barrier();
    else x = shuffle_xor<WAVE>(x, 1);
  }
  if (is("read past the end")) x = load_raw<float>(in, t + 1);
  if (is("vector past the end")) x = bits_to_float(load_packed<float>(in, 4 * (t / 4 + 1)).word[0]);
  if (is("unaligned vector")) x = bits_to_float(load_packed<float>(in, 1).word[0]);
  if (is("write to the input")) store_raw<float>(ptr<float>(const_cast<float*>(in.raw())), t, x);
  if (is("missing barrier")) {
    slots.set(t, x);
    x = slots.get(kThreads - 1 - t);
  }
  if (is("slots reused")) {
    slots.set(t, x);
    block_barrier();
    x = slots.get(kThreads - 1 - t);
    slots.set(t, x);
  }
  if (is("shared index")) slots.set(t + 1, x);
  store_raw<float>(out, t, x);
}

int main(int, char** arguments) {
  alignas(16) static float in[kThreads], out[kThreads];
  for (int i = 0; i < kThreads; ++i) in[i] = static_cast<float>(i);
  emulator::machine().wave = std::atoi(arguments[2]);
  emulator::machine().ranges = {{reinterpret_cast<char*>(in), reinterpret_cast<char*>(in + kThreads), false},
                                {reinterpret_cast<char*>(out), reinterpret_cast<char*>(out + kThreads), true}};
  const int code = with_wave([&](auto wave) {
    return NEOX_LAUNCH(nullptr, 2, kThreads, (kernel<decltype(wave)::value>), arguments[1], out, in);
  });
  std::puts(code == 0 ? "ok" : last_error().c_str());
  if (code == 0 && std::strcmp(arguments[1], "none") == 0)
    for (float x : out)
      if (x != kThreads * (kThreads - 1) / 2) return 1;
  return 0;
}

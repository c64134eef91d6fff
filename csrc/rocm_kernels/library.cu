// What the library says about itself.
#include "launch.h"

namespace neox {

std::string& last_error() {
  static thread_local std::string error;
  return error;
}

}  // namespace neox

extern "C" const char* neox_last_error(void) { return neox::last_error().c_str(); }

#if defined(NEOX_HOST_EMULATOR)

extern "C" int neox_wave_size(void) { return emulator::machine().wave; }
extern "C" const char* neox_architectures(void) { return "host emulator"; }

extern "C" void neox_emulator_allow(const void* begin, int64_t bytes, int writable) {
  const char* start = static_cast<const char*>(begin);
  emulator::machine().ranges.push_back({start, start + bytes, writable != 0});
}
extern "C" void neox_emulator_forget(void) { emulator::machine().ranges.clear(); }
extern "C" int neox_emulator_set_wave(int wave) {
  if (wave != 64 && wave * 2 != 64) return neox::refuse("the emulator has waves of 64 lanes or half of that");
  emulator::machine().wave = wave;
  return 0;
}

#else

#define NEOX_STRING_OF(...) #__VA_ARGS__  // a list: its commas separate arguments
#define NEOX_STRING(...) NEOX_STRING_OF(__VA_ARGS__)

extern "C" int neox_wave_size(void) { return NEOX_WAVE; }
extern "C" const char* neox_architectures(void) { return NEOX_STRING(NEOX_ARCHITECTURES); }

#endif

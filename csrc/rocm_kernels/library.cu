// Queries about the library: last error, wave size, compute units, architectures; settings of the emulator.
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
extern "C" int neox_compute_units(void) { return emulator::machine().compute_units; }
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
extern "C" int neox_emulator_set_compute_units(int units) {
  if (units < 1) return neox::refuse("the emulator has at least one compute unit");
  emulator::machine().compute_units = units;
  return 0;
}
extern "C" int64_t neox_emulator_launches(void) { return emulator::machine().launches; }

#else

#define NEOX_STRING_OF(names) #names
#define NEOX_STRING(names) NEOX_STRING_OF(names)

extern "C" int neox_wave_size(void) { return NEOX_WAVE; }
extern "C" int neox_compute_units(void) {
  int device = 0, units = 0;
#if defined(__HIP__)
  const bool known = hipGetDevice(&device) == hipSuccess &&
                     hipDeviceGetAttribute(&units, hipDeviceAttributeMultiprocessorCount, device) == hipSuccess;
#else
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&units, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
#endif
  return known && units > 0 ? units : 1;
}
extern "C" const char* neox_architectures(void) { return NEOX_STRING(NEOX_ARCHITECTURES); }

#endif

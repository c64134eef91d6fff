// Runs the kernel sources of this folder on the CPU, for tests: too slow for training.
//
// Every thread of a block is a fiber; one block runs at a time, on the calling thread. A lane runs until it reaches a
// shuffle, a barrier or its end, so the emulator sees exactly which lanes meet. It stops a launch with a message when
//   - a shuffle is not reached by every lane of its wave, or a barrier by every thread of the block;
//   - a global access is outside the tensors given to the launch, or a vector access is not aligned to its size;
//   - a shared array is indexed out of bounds, or two threads access an element between two barriers and one writes it.
// It checks indexing, edges and arithmetic for waves of 32 and 64. It says nothing about speed, nor, beyond the race
// check on shared memory, about the order in which real waves interleave.
#pragma once

#include <cmath>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include <ucontext.h>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __shared__ static

namespace emulator {

constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 * 1024;

enum class State { kReady, kShuffle, kBarrier, kDone };

struct Lane {
  State state;
  jmp_buf resume;
  bool started;
  int collectives;  // shuffles and barriers passed so far: lanes that meet must agree on it
  uint32_t value;   // this lane's operand of a shuffle
  int mask;
};

struct Range {
  const char* begin;
  const char* end;
  bool writable;
};

struct Machine {
  int wave = 64;
  int compute_units = 110;
  int64_t launches = 0;
  int threads = 0;
  int thread = 0;             // running fiber
  int64_t block = 0;          // running block, linear index in the grid
  int64_t index[3] = {0, 0, 0};  // its x, y, z
  int epoch = 0;      // barriers passed, over all blocks and launches
  std::vector<Lane> lanes = std::vector<Lane>(kMaxThreads);
  std::vector<std::unique_ptr<char[]>> stacks = std::vector<std::unique_ptr<char[]>>(kMaxThreads);
  jmp_buf scheduler;
  ucontext_t back;
  const std::function<void()>* body = nullptr;
  std::vector<Range> ranges;
  std::string error;
};

inline Machine& machine() {
  static Machine the_machine;
  return the_machine;
}

inline std::string where() {
  Machine& m = machine();
  return "block " + std::to_string(m.block) + ", thread " + std::to_string(m.thread) + ": ";
}

// Returns to the scheduler. A fiber stopped by an error is abandoned; the next launch reuses its stack.
[[noreturn]] inline void yield_to_scheduler() { _longjmp(machine().scheduler, 1); }

[[noreturn]] inline void fail(const std::string& message) {
  machine().error = where() + message;
  yield_to_scheduler();
}

inline void wait_as(State state) {
  Machine& m = machine();
  Lane& lane = m.lanes[m.thread];
  lane.state = state;
  ++lane.collectives;
  if (_setjmp(lane.resume) == 0) yield_to_scheduler();
}

inline uint32_t shuffle_xor_bits(uint32_t value, int mask) {
  Machine& m = machine();
  const int self = m.thread;
  m.lanes[self].value = value;
  m.lanes[self].mask = mask;
  wait_as(State::kShuffle);  // run_wave() exchanges the values once every lane of the wave has set one
  return m.lanes[self].value;
}

inline void barrier() { wait_as(State::kBarrier); }

inline void fiber_entry() {
  Machine& m = machine();
  (*m.body)();
  m.lanes[m.thread].state = State::kDone;
  yield_to_scheduler();
}

// Runs one fiber until it waits or ends.
inline void run_lane(int thread) {
  Machine& m = machine();
  m.thread = thread;
  Lane& lane = m.lanes[thread];
  if (_setjmp(m.scheduler) != 0) return;
  if (lane.started) _longjmp(lane.resume, 1);
  lane.started = true;
  if (!m.stacks[thread]) m.stacks[thread].reset(new char[kStackBytes]);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = m.stacks[thread].get();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = &m.back;
  makecontext(&context, fiber_entry, 0);
  setcontext(&context);
}

inline const char* name_of(State state) {
  return state == State::kShuffle ? "a shuffle" : state == State::kBarrier ? "a barrier" : "its end";
}

// Whether the lanes [first, last), which have all stopped, stopped at the same place; sets the error if not.
inline bool met(int first, int last, const char* whom) {
  Machine& m = machine();
  const Lane& head = m.lanes[first];
  for (int i = first + 1; i < last; ++i) {
    const Lane& lane = m.lanes[i];
    if (lane.state != head.state || lane.collectives != head.collectives) {
      m.error = "block " + std::to_string(m.block) + ": threads " + std::to_string(first) + " and " + std::to_string(i) +
                " of one " + whom + " do not meet: one is at " + name_of(head.state) + " (number " +
                std::to_string(head.collectives) + "), the other at " + name_of(lane.state) + " (number " +
                std::to_string(lane.collectives) + ")";
      return false;
    }
  }
  return true;
}

// Advances one wave until it waits at a barrier or ends; exchanges the values of its shuffles on the way.
inline bool run_wave(int first, int last) {
  Machine& m = machine();
  uint32_t given[64];
  while (true) {
    for (int i = first; i < last; ++i) {
      run_lane(i);
      if (!m.error.empty()) return false;
    }
    if (!met(first, last, "wave")) return false;
    if (m.lanes[first].state != State::kShuffle) return true;
    for (int i = first; i < last; ++i) given[i - first] = m.lanes[i].value;
    for (int i = first; i < last; ++i) {
      const int partner = (i - first) ^ m.lanes[i].mask;
      if (partner >= last - first) {
        m.error = "a shuffle reads lane " + std::to_string(partner) + " of " + std::to_string(last - first);
        return false;
      }
      m.lanes[i].value = given[partner];
    }
  }
}

inline bool run_block() {
  Machine& m = machine();
  for (int i = 0; i < m.threads; ++i) m.lanes[i] = Lane{};
  while (true) {
    ++m.epoch;
    for (int first = 0; first < m.threads; first += m.wave) {
      if (!run_wave(first, first + m.wave < m.threads ? first + m.wave : m.threads)) return false;
    }
    if (!met(0, m.threads, "block")) return false;
    if (m.lanes[0].state == State::kDone) return true;
  }
}

struct Grid {
  int64_t x = 1, y = 1, z = 1;
  Grid(int64_t nx, int64_t ny = 1, int64_t nz = 1) : x(nx), y(ny), z(nz) {}
};

// Runs `body` for every thread of every block; 0, or 1 with the reason in machine().error.
inline int launch(Grid grid, int threads, const std::function<void()>& body) {
  Machine& m = machine();
  m.error.clear();
  if (threads < 1 || threads > kMaxThreads || threads % m.wave != 0) {
    m.error = "a block of " + std::to_string(threads) + " threads is not made of whole waves of " + std::to_string(m.wave);
    return 1;
  }
  ++m.launches;
  m.threads = threads;
  m.body = &body;
  for (m.block = 0; m.block < grid.x * grid.y * grid.z; ++m.block) {
    m.index[0] = m.block % grid.x;
    m.index[1] = m.block / grid.x % grid.y;
    m.index[2] = m.block / grid.x / grid.y;
    if (!run_block()) return 1;
  }
  return 0;
}

inline void check(const void* address, size_t bytes, bool write) {
  const char* begin = static_cast<const char*>(address);
  if (reinterpret_cast<uintptr_t>(begin) % bytes != 0) fail("a " + std::to_string(bytes) + "-byte access is not aligned");
  for (const Range& range : machine().ranges) {
    if (begin >= range.begin && begin + bytes <= range.end && (range.writable || !write)) return;
  }
  fail(std::string(write ? "a write" : "a read") + " of " + std::to_string(bytes) + " bytes is outside every tensor");
}

}  // namespace emulator

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

namespace neox {

// A device pointer without dereference: all access goes through the loads and stores of platform.h, which check it.
template <class T>
class ptr {
 public:
  ptr(T* raw) : raw_(raw) {}  // NOLINT: kernels are called with plain pointers, as on a GPU
  template <class U, class = std::enable_if_t<std::is_same_v<const U, T>>>
  ptr(ptr<U> other) : raw_(other.raw()) {}
  ptr operator+(int64_t elements) const { return ptr(raw_ + elements); }
  explicit operator bool() const { return raw_ != nullptr; }
  T* raw() const { return raw_; }

 private:
  T* raw_;
};

// An array in the block's shared memory that records which threads accessed each element since the last barrier.
template <class T, int N>
class Shared {
 public:
  T get(int i) {
    Access& a = touch(i);
    if (a.write_epoch == emulator::machine().epoch && a.writer != emulator::machine().thread)
      emulator::fail("reads shared element " + std::to_string(i) + " that thread " + std::to_string(a.writer) +
                     " wrote since the last barrier");
    if (a.read_epoch == emulator::machine().epoch && a.reader != emulator::machine().thread) {
      a.reader = -1;  // several readers
    } else {
      a.reader = emulator::machine().thread;
    }
    a.read_epoch = emulator::machine().epoch;
    return data_[i];
  }
  void set(int i, T value) {
    Access& a = touch(i);
    const emulator::Machine& m = emulator::machine();
    if ((a.write_epoch == m.epoch && a.writer != m.thread) || (a.read_epoch == m.epoch && a.reader != m.thread))
      emulator::fail("writes shared element " + std::to_string(i) + " that another thread touched since the last barrier");
    a.write_epoch = m.epoch;
    a.writer = m.thread;
    data_[i] = value;
  }

 private:
  struct Access {
    int read_epoch, reader, write_epoch, writer;
  };
  Access& touch(int i) {
    if (i < 0 || i >= N) emulator::fail("shared index " + std::to_string(i) + " of " + std::to_string(N));
    return access_[i];
  }
  T data_[N];
  Access access_[N];
};

inline int thread_index() { return emulator::machine().thread; }
inline int64_t block_x() { return emulator::machine().index[0]; }
inline int64_t block_y() { return emulator::machine().index[1]; }
inline int64_t block_z() { return emulator::machine().index[2]; }
inline void block_barrier() { emulator::barrier(); }

template <int WAVE>
inline float shuffle_xor(float value, int mask) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = emulator::shuffle_xor_bits(bits, mask);
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace neox

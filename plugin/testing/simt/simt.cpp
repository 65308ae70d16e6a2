// SPDX-License-Identifier: Apache-2.0
#include "testing/simt/simt.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

ThreadIndices current;

namespace {

#if defined(SIMT_ASAN)
constexpr size_t kStackSize = 256 << 10;
#else
constexpr size_t kStackSize = 64 << 10;
#endif

// splitmix64
class Random {
 public:
  void seed(uint64_t value) { state_ = value; }
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  unsigned below(unsigned n) { return static_cast<unsigned>(((next() >> 32) * n) >> 32); }

 private:
  uint64_t state_ = 0;
};

}  // namespace
}  // namespace simt

#if defined(__x86_64__)
// Saves the callee-saved registers on this stack, its pointer in *save, and goes on where the other
// stack was left. Far cheaper than swapcontext(), which asks the kernel for the signal mask.
extern "C" void simt_switch_stack(void** save, void* load);
asm(R"(
.text
.globl simt_switch_stack
.hidden simt_switch_stack
.type simt_switch_stack, @function
simt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stack, .-simt_switch_stack
)");
#endif

namespace simt {
namespace {

// A stack on which a thread's kernel runs, left and entered by the scheduler.
class Fiber {
 public:
  Fiber() {
    void* memory =
        mmap(nullptr, kStackSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    stack_ = static_cast<char*>(memory);
    mprotect(stack_, 4096, PROT_NONE);  // an overflow ends the process instead of passing unseen
  }
  ~Fiber() { munmap(stack_, kStackSize); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes the next enter() call entry() on the empty stack. entry must never return.
  void prepare(void (*entry)()) {
#if defined(SIMT_ASAN)
    __asan_unpoison_memory_region(stack_ + 4096, kStackSize - 4096);
    fake_stack_ = nullptr;
#endif
#if defined(__x86_64__)
    auto* top = reinterpret_cast<void**>(stack_ + kStackSize - 64);
    *--top = nullptr;  // entry's return address; keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    pointer_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = kStackSize;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  // From the scheduler: runs the fiber until it leaves.
  void enter() {
#if defined(SIMT_ASAN)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_, kStackSize);
#endif
#if defined(__x86_64__)
    simt_switch_stack(&scheduler_pointer_, pointer_);
#else
    swapcontext(&scheduler_context_, &context_);
#endif
#if defined(SIMT_ASAN)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  // From the fiber: back to the scheduler. for_good: the fiber will be prepared anew.
  void leave(bool for_good) {
    (void)for_good;
#if defined(SIMT_ASAN)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, scheduler_stack_,
                                   scheduler_stack_size_);
#endif
#if defined(__x86_64__)
    simt_switch_stack(&pointer_, scheduler_pointer_);
#else
    swapcontext(&context_, &scheduler_context_);
#endif
#if defined(SIMT_ASAN)
    __sanitizer_finish_switch_fiber(fake_stack_, &scheduler_stack_, &scheduler_stack_size_);
#endif
  }

  // First thing on a fresh stack.
  void arrived() {
#if defined(SIMT_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_, &scheduler_stack_size_);
#endif
  }

 private:
  char* stack_ = nullptr;
#if defined(SIMT_ASAN)
  void* fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_size_ = 0;
#endif
#if defined(__x86_64__)
  void* pointer_ = nullptr;
  void* scheduler_pointer_ = nullptr;
#else
  ucontext_t context_, scheduler_context_;
#endif
};

enum class State { kReady, kAtBarrier, kAtWarpOperation, kFinished };

struct Copy {
  void* to;
  const void* from;
  size_t size;
};

struct Thread {
  std::unique_ptr<Fiber> fiber;
  dim3 index;
  State state = State::kReady;
  const char* barrier_file = nullptr;
  int barrier_line = 0;
  unsigned mask = 0;
  Resolve resolve = nullptr;
  void* payload = nullptr;
  const char* operation = nullptr;
  std::deque<std::vector<Copy>> copy_groups;
  std::vector<Copy> open_copies;
};

class Machine {
 public:
  cudaError_t launch(const char* kernel, dim3 grid, dim3 block, size_t shared_size,
                     const std::function<void()>& body) {
    kernel_ = kernel;
    body_ = &body;
    launches_.insert(std::string(kernel) + " " + std::to_string(block.x * block.y * block.z) + " " +
                     std::to_string(shared_size));
    size_ = block.x * block.y * block.z;
    if (size_ == 0 || size_ > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 ||
        grid.z > 65535 || grid.x > 0x7fffffffu || shared_size > (227u << 10)) {
      error_ = std::string(kernel) + ": a grid, block or shared memory size that no GPU takes";
      return status_ = cudaErrorInvalidConfiguration;
    }
    while (threads_.size() < size_) {
      threads_.emplace_back();
      threads_.back().fiber = std::make_unique<Fiber>();
    }
    current.block_size = block;
    current.grid_size = grid;
    shared_size_ = shared_size;
    const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
    // A random order of blocks: a walk by a step that shares no factor with their number.
    uint64_t step = random_.next() % blocks, at = random_.next() % blocks;
    while (greatest_common_divisor(step, blocks) != 1) step = (step + 1) % (blocks + 1);
    for (uint64_t i = 0; i < blocks; ++i, at = (at + step) % blocks) {
      current.block.x = static_cast<unsigned>(at % grid.x);
      current.block.y = static_cast<unsigned>(at / grid.x % grid.y);
      current.block.z = static_cast<unsigned>(at / grid.x / grid.y);
      if (!run_block(block)) {
        // Threads of the failed block still hold their stacks.
        threads_.clear();
        return status_ = cudaErrorLaunchFailure;
      }
    }
    return cudaSuccess;
  }

  void barrier(const char* file, int line) {
    Thread& thread = *running_;
    thread.state = State::kAtBarrier;
    thread.barrier_file = file;
    thread.barrier_line = line;
    thread.fiber->leave(false);
  }

  void warp_operation(unsigned mask, Resolve resolve, void* payload, const char* name) {
    Thread& thread = *running_;
    const unsigned lane = running_index_ % kWarp;
    if ((mask >> lane & 1) == 0)
      fail(std::string(name) + " by lane " + std::to_string(lane) + ", which is not in its mask");
    thread.state = State::kAtWarpOperation;
    thread.mask = mask;
    thread.resolve = resolve;
    thread.payload = payload;
    thread.operation = name;
    thread.fiber->leave(false);
  }

  void maybe_yield() {
    if (random_.below(4) == 0) running_->fiber->leave(false);
  }

  [[noreturn]] void fail(const std::string& what) {
    if (running_ == nullptr) {
      std::fprintf(stderr, "simt: %s outside a kernel\n", what.c_str());
      std::abort();
    }
    block_error_ = what;
    running_->fiber->leave(false);
    std::abort();  // a failed block is never entered again
  }

  void finish() {
    running_->state = State::kFinished;
    running_->fiber->leave(true);
  }

  void* shared_memory(size_t size) {
    if (size > shared_size_)
      fail("the kernel uses " + std::to_string(size) + " bytes of shared memory, the launch gave " +
           std::to_string(shared_size_));
    return shared_.get();
  }

  Thread& running() { return *running_; }
  unsigned running_lane() const { return running_index_ % kWarp; }
  void run_body() { (*body_)(); }

  std::mutex mutex;
  Random random_;
  std::string error_;
  cudaError_t status_ = cudaSuccess;
  int fault_ = 0;
  int multiprocessors_ = 4;
  int garbage_ = 0xC5;
  std::set<std::string> launches_;
  std::string launch_list_;

 private:
  static uint64_t greatest_common_divisor(uint64_t a, uint64_t b) {
    while (b != 0) {
      const uint64_t rest = a % b;
      a = b;
      b = rest;
    }
    return a;
  }

  static void thread_main();

  std::string where(unsigned index) const {
    const dim3& t = threads_[index].index;
    const dim3& b = current.block;
    return "thread (" + std::to_string(t.x) + ", " + std::to_string(t.y) + ", " +
           std::to_string(t.z) + ") of block (" + std::to_string(b.x) + ", " + std::to_string(b.y) +
           ", " + std::to_string(b.z) + ")";
  }

  static std::string barrier_of(const Thread& thread) {
    return std::string(thread.barrier_file) + ":" + std::to_string(thread.barrier_line);
  }

  bool report(unsigned index, const std::string& what) {
    error_ = std::string(kernel_) + ", " + where(index) + ": " + what;
    running_ = nullptr;
    return false;
  }

  bool run_block(dim3 block) {
    // Exactly the size asked for, so that AddressSanitizer guards the end; garbage, so that nothing
    // is read that was not written.
    shared_.reset(static_cast<char*>(
        std::aligned_alloc(128, (shared_size_ + 127) / 128 * 128 + (shared_size_ == 0 ? 128 : 0))));
    std::memset(shared_.get(), garbage_, shared_size_);
#if defined(SIMT_ASAN)
    const size_t room = (shared_size_ + 127) / 128 * 128 + (shared_size_ == 0 ? 128 : 0);
    __asan_poison_memory_region(shared_.get() + (shared_size_ + 7) / 8 * 8,
                                room - (shared_size_ + 7) / 8 * 8);
#endif
    for (std::vector<unsigned>& warp : ready_) warp.clear();
    num_ready_ = 0;
    draw_priorities();
    for (unsigned i = 0; i < size_; ++i) {
      Thread& thread = threads_[i];
      thread.index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
      thread.state = State::kReady;
      thread.copy_groups.clear();
      thread.open_copies.clear();
      thread.fiber->prepare(&Machine::thread_main);
      make_ready(i);
    }
    unsigned finished = 0, at_barrier = 0;
    block_error_.clear();
    while (finished < size_) {
      if (num_ready_ == 0) {
        if (at_barrier == size_) {
          const Thread& first = threads_[0];
          for (unsigned i = 0; i < size_; ++i) {
            Thread& thread = threads_[i];
            if (thread.barrier_line != first.barrier_line ||
                std::strcmp(thread.barrier_file, first.barrier_file) != 0)
              return report(i, "divergent barriers: waits at " + barrier_of(thread) +
                                   " while thread 0 waits at " + barrier_of(first));
            thread.state = State::kReady;
            make_ready(i);
          }
          at_barrier = 0;
          draw_priorities();
          continue;
        }
        return report_deadlock();
      }
      const unsigned index = take_ready();
      running_index_ = index;
      running_ = &threads_[index];
      current.thread = running_->index;
      running_->fiber->enter();
      running_ = nullptr;
      if (!block_error_.empty()) return report(index, block_error_);

      switch (threads_[index].state) {
        case State::kReady:
          make_ready(index);
          break;
        case State::kAtBarrier:
          ++at_barrier;
          break;
        case State::kAtWarpOperation:
          if (!try_warp_operation(index)) return false;
          break;
        case State::kFinished:
          if (!threads_[index].open_copies.empty() || !threads_[index].copy_groups.empty())
            return report(index, "ends with asynchronous copies that nobody waited for");
          ++finished;
          break;
      }
    }
    return true;
  }

  // From here to the next barrier either all warps get turns, or some run as far as they can before
  // others begin: a warp that has hurried on meets a missing barrier that even progress would hide.
  void draw_priorities() {
    by_priority_ = random_.below(2) == 0;
    for (uint64_t& priority : priorities_) priority = random_.next();
  }

  void make_ready(unsigned index) {
    ready_[index / kWarp].push_back(index);
    ++num_ready_;
  }

  // Takes out the thread that runs next.
  unsigned take_ready() {
    const unsigned warps = (size_ + kWarp - 1) / kWarp;
    unsigned warp = random_.below(warps);
    if (by_priority_) {
      for (unsigned w = 0; w < warps; ++w)
        if (ready_[warp].empty() || (!ready_[w].empty() && priorities_[w] > priorities_[warp]))
          warp = w;
    } else {
      while (ready_[warp].empty()) warp = warp + 1 == warps ? 0 : warp + 1;
    }
    std::vector<unsigned>& ready = ready_[warp];
    const unsigned slot = random_.below(static_cast<unsigned>(ready.size()));
    const unsigned index = ready[slot];
    ready[slot] = ready.back();
    ready.pop_back();
    --num_ready_;
    return index;
  }

  bool report_deadlock() {
    for (unsigned i = 0; i < size_; ++i)
      if (threads_[i].state == State::kAtWarpOperation)
        return report(i, std::string("waits at ") + threads_[i].operation + " with mask " +
                             std::to_string(threads_[i].mask) +
                             " for lanes that never come: they ended or wait elsewhere");
    for (unsigned i = 0; i < size_; ++i)
      if (threads_[i].state == State::kAtBarrier)
        return report(i, "divergent barrier: waits at " + barrier_of(threads_[i]) +
                             " while other threads have ended");
    return report(0, "deadlock");
  }

  bool try_warp_operation(unsigned index) {
    const unsigned first = index / kWarp * kWarp;
    const Thread& mine = threads_[index];
    void* payloads[kWarp] = {};
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if ((mine.mask >> lane & 1) == 0) continue;
      if (first + lane >= size_)
        return report(index, std::string(mine.operation) + " with lanes that do not exist");
      const Thread& other = threads_[first + lane];
      if (other.state == State::kFinished)
        return report(index, std::string(mine.operation) + " with a mask that holds lane " +
                                 std::to_string(lane) + ", which has ended");
      if (other.state != State::kAtWarpOperation) return true;  // not here yet
      if (other.mask != mine.mask || other.resolve != mine.resolve)
        return report(index, std::string(mine.operation) + " meets " + other.operation +
                                 " of lane " + std::to_string(lane) +
                                 (other.mask != mine.mask ? " with another mask" : ""));
      payloads[lane] = other.payload;
    }
    if (const char* wrong = mine.resolve(payloads)) return report(index, wrong);
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (payloads[lane] == nullptr) continue;
      threads_[first + lane].state = State::kReady;
      make_ready(first + lane);
    }
    return true;
  }

  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };

  const char* kernel_ = nullptr;
  const std::function<void()>* body_ = nullptr;
  unsigned size_ = 0;
  size_t shared_size_ = 0;
  std::unique_ptr<char, Free> shared_;
  std::vector<Thread> threads_;
  std::vector<unsigned> ready_[1024 / kWarp];  // of each warp
  unsigned num_ready_ = 0;
  bool by_priority_ = false;
  uint64_t priorities_[1024 / kWarp] = {};
  Thread* running_ = nullptr;
  unsigned running_index_ = 0;
  std::string block_error_;
};

Machine& machine() {
  static auto* instance = new Machine;
  return *instance;
}

void Machine::thread_main() {
  Machine& m = machine();
  m.running_->fiber->arrived();
  m.run_body();
  m.finish();
  std::abort();
}

void perform(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) std::memcpy(copy.to, copy.from, copy.size);
}

}  // namespace

void barrier(const char* file, int line) { machine().barrier(file, line); }
void warp_operation(unsigned mask, Resolve resolve, void* payload, const char* name) {
  machine().warp_operation(mask, resolve, payload, name);
}
unsigned lane() { return machine().running_lane(); }
void maybe_yield() { machine().maybe_yield(); }
void fail(const std::string& what) { machine().fail(what); }
void* shared_memory(size_t size) { return machine().shared_memory(size); }
int fault() { return machine().fault_; }
int multiprocessors() { return machine().multiprocessors_; }

void copy_async(void* to, const void* from, size_t size) {
  require_aligned(static_cast<const char*>(to), size);
  require_aligned(static_cast<const char*>(from), size);
  machine().running().open_copies.push_back({to, from, size});
}
void copy_async_commit() {
  Thread& thread = machine().running();
  thread.copy_groups.push_back(std::move(thread.open_copies));
  thread.open_copies.clear();
}
void copy_async_wait(int groups_left) {
  Thread& thread = machine().running();
  while (static_cast<int>(thread.copy_groups.size()) > groups_left) {
    perform(thread.copy_groups.front());
    thread.copy_groups.pop_front();
  }
}

namespace {
struct BallotPayload {
  bool predicate;
  unsigned result;
};
const char* resolve_ballot(void* const payloads[kWarp]) {
  unsigned bits = 0;
  for (unsigned i = 0; i < kWarp; ++i)
    if (payloads[i] != nullptr && static_cast<BallotPayload*>(payloads[i])->predicate)
      bits |= 1u << i;
  for (unsigned i = 0; i < kWarp; ++i)
    if (payloads[i] != nullptr) static_cast<BallotPayload*>(payloads[i])->result = bits;
  return nullptr;
}
}  // namespace

unsigned ballot(unsigned mask, bool predicate) {
  BallotPayload payload = {predicate, 0};
  warp_operation(mask, &resolve_ballot, &payload, "__ballot_sync");
  return payload.result;
}

cudaError_t run(const char* kernel, dim3 grid, dim3 block, size_t shared_size,
                const std::function<void()>& body) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  return m.launch(kernel, grid, block, shared_size, body);
}

}  // namespace simt

cudaError_t cudaGetLastError() {
  simt::Machine& m = simt::machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  const cudaError_t status = m.status_;
  m.status_ = cudaSuccess;
  return status;
}

// For tests, by ctypes.
extern "C" {
__attribute__((visibility("default"))) void simt_set_seed(uint64_t seed) {
  simt::machine().random_.seed(seed);
}
__attribute__((visibility("default"))) void simt_set_fault(int fault) {
  simt::machine().fault_ = fault;
}
__attribute__((visibility("default"))) void simt_set_multiprocessors(int count) {
  simt::machine().multiprocessors_ = count;
}
// The byte that shared memory is filled with before a block starts.
__attribute__((visibility("default"))) void simt_set_garbage(int byte) {
  simt::machine().garbage_ = byte;
}
// What has been launched so far: a line for each kernel, its threads and its shared memory.
__attribute__((visibility("default"))) const char* simt_launches() {
  simt::Machine& m = simt::machine();
  m.launch_list_.clear();
  for (const std::string& launch : m.launches_) m.launch_list_ += launch + "\n";
  return m.launch_list_.c_str();
}
// The sentence about the last failed launch; empty after none.
__attribute__((visibility("default"))) const char* simt_last_error() {
  return simt::machine().error_.c_str();
}
__attribute__((visibility("default"))) void simt_clear_error() {
  simt::machine().error_.clear();
  simt::machine().status_ = cudaSuccess;
}
}

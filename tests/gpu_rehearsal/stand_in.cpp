// SPDX-License-Identifier: Apache-2.0
// Stands in for libcuda.so and for libadaptive_k_cuda.so at once: device memory is the host's, and
// a launch runs the kernels in the interpreter (plugin/testing/simt). It is as late as CUDA allows:
// nothing of a stream happens before somebody waits for it, and the default stream's work (fills
// and copies from pageable memory) comes last where all is waited for. Code that relies on an order
// that CUDA does not promise fails here every time.
//
// STAND_IN_FAULTS asks for faults: "no_device" makes cuInit() refuse; "FORMAT PATH=WHAT" (such as
// "int4 decode=dead"; several with commas) spoils launches of that weight format on that path: dead
// loses the context as an illegal address does, hang never ends, crash ends the process.
#include <dlfcn.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "cuda/mamba/c_api.h"
#include "cuda/moe/c_api.h"

namespace {

constexpr int kInvalidValue = 1, kOutOfMemory = 2, kNoDevice = 100, kIllegalAddress = 700;
constexpr int kLaunchFailed = 719, kNotSupported = 801;

using Work = std::function<int()>;
using Queue = std::vector<Work>;
using Clock = std::chrono::steady_clock;

struct Event {
  void* stream;
  Clock::time_point when;
};

std::map<void*, Queue> queues;  // by stream; null is the default stream
Queue* captured = nullptr;      // of the stream that is being captured
int lost = 0;                   // the error that every call returns from now on

// The function of the interpreter's library that this file puts one of its own before.
template <typename Function>
Function* interpreter(const char* name) {
  static void* const library = dlopen("libadaptive_k_simt.so", RTLD_NOW);
  return reinterpret_cast<Function*>(dlsym(library, name));
}

std::string faults() {
  const char* const text = std::getenv("STAND_IN_FAULTS");
  return text == nullptr ? "" : text;
}

void run(void* stream) {
  Queue queue;
  queue.swap(queues[stream]);
  for (const Work& work : queue)
    if (lost == 0) lost = work();
}

void run_all() {
  for (auto& entry : queues)
    if (entry.first != nullptr) run(entry.first);
  run(nullptr);
}

int enqueue(void* stream, Work work) {
  (captured != nullptr && stream != nullptr ? *captured : queues[stream])
      .push_back(std::move(work));
  return lost;
}

int fault(const std::string& launch) {
  const std::string text = faults();
  if (text.find(launch + "=dead") != std::string::npos) return kIllegalAddress;
  if (text.find(launch + "=crash") != std::string::npos) raise(SIGSEGV);
  while (text.find(launch + "=hang") != std::string::npos) pause();
  return 0;
}

}  // namespace

extern "C" {

int adaptive_k_cuda_launch(const AdaptiveKLayer* layer, const AdaptiveKPointers* pointers,
                           void* workspace, void* stream) {
  if (adaptive_k_cuda_check(layer) != nullptr) return kInvalidValue;
  return enqueue(stream, [layer = *layer, pointers = *pointers, workspace] {
    static const char* const paths[] = {"", "decode", "prefill"};
    adaptive_k::MoeParams params;
    for (int32_t i = 0; i < adaptive_k::kNumAttributes<adaptive_k::Moe>; ++i)
      adaptive_k::Moe::kAttributes[i].set(&params, layer.attributes[i]);
    const std::string format = params.weight_format == adaptive_k::WeightFormat::kInt8 ? "int8"
                               : params.weight_format == adaptive_k::WeightFormat::kInt4
                                   ? "int4"
                                   : "element";
    if (const int status = fault(format + " " + paths[adaptive_k_cuda_path(&layer)])) return status;
    const auto launch = interpreter<decltype(adaptive_k_cuda_launch)>("adaptive_k_cuda_launch");
    return launch(&layer, &pointers, workspace, nullptr) == 0 ? 0 : kLaunchFailed;
  });
}

int adaptive_k_cuda_mamba_launch(const AdaptiveKMambaLayer* layer,
                                 const AdaptiveKMambaPointers* pointers, void* workspace,
                                 void* stream) {
  if (adaptive_k_cuda_mamba_check(layer) != nullptr) return kInvalidValue;
  return enqueue(stream, [layer = *layer, pointers = *pointers, workspace] {
    const auto launch =
        interpreter<decltype(adaptive_k_cuda_mamba_launch)>("adaptive_k_cuda_mamba_launch");
    return launch(&layer, &pointers, workspace, nullptr) == 0 ? 0 : kLaunchFailed;
  });
}

int cuInit(unsigned) { return faults().find("no_device") == std::string::npos ? 0 : kNoDevice; }
int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
int cuGetErrorName(int status, const char** name) {
  static const std::map<int, const char*> names = {
      {kInvalidValue, "CUDA_ERROR_INVALID_VALUE"}, {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY"},
      {kNoDevice, "CUDA_ERROR_NO_DEVICE"},         {kIllegalAddress, "CUDA_ERROR_ILLEGAL_ADDRESS"},
      {kLaunchFailed, "CUDA_ERROR_LAUNCH_FAILED"}, {kNotSupported, "CUDA_ERROR_NOT_SUPPORTED"}};
  const auto found = names.find(status);
  *name = found == names.end() ? nullptr : found->second;
  return found == names.end() ? kInvalidValue : 0;
}
int cuDeviceGetCount(int* count) {
  *count = 1;
  return 0;
}
int cuDeviceGet(int* device, int) {
  *device = 0;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int) {
  *context = nullptr;
  return 0;
}
int cuCtxSetCurrent(void*) { return lost; }
int cuDeviceGetName(char* name, int size, int) {
  std::strncpy(name, "interpreter on a CPU", static_cast<size_t>(size));
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 75 ? 9 : 0;  // the compute capability's major number
  return 0;
}
int cuMemGetInfo_v2(size_t* free, size_t* total) {
  *free = *total = size_t{1} << 27;
  return lost;
}
int cuMemAlloc_v2(uint64_t* address, size_t size) {
  *address = reinterpret_cast<uint64_t>(std::aligned_alloc(256, (size + 255) / 256 * 256));
  return *address == 0 ? kOutOfMemory : lost;
}
int cuMemFree_v2(uint64_t address) {
  run_all();
  std::free(reinterpret_cast<void*>(address));
  return lost;
}
int cuMemsetD8_v2(uint64_t address, unsigned char byte, size_t size) {
  return enqueue(nullptr, [=] {
    std::memset(reinterpret_cast<void*>(address), byte, size);
    return 0;
  });
}
int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t size) {
  const auto* const bytes = static_cast<const char*>(from);
  return enqueue(nullptr, [to, staged = std::vector<char>(bytes, bytes + size)] {
    std::memcpy(reinterpret_cast<void*>(to), staged.data(), staged.size());
    return 0;
  });
}
int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t size) {
  run(nullptr);
  if (lost == 0) std::memcpy(to, reinterpret_cast<const void*>(from), size);
  return lost;
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t size, void* stream) {
  return enqueue(stream, [=] {
    std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), size);
    return 0;
  });
}
int cuStreamCreate(void** stream, unsigned flags) {
  if (flags != 1) return kNotSupported;  // one that waits for the default stream
  *stream = new char;
  return lost;
}
int cuStreamSynchronize(void* stream) {
  run(stream);
  return lost;
}
int cuCtxSynchronize() {
  run_all();
  return lost;
}
int cuStreamBeginCapture_v2(void*, int) {
  captured = new Queue;
  return lost;
}
int cuStreamEndCapture(void*, void** graph) {
  *graph = captured;
  captured = nullptr;
  return lost;
}
int cuGraphInstantiateWithFlags(void** executable, void* graph, uint64_t) {
  *executable = graph;
  return lost;
}
int cuGraphLaunch(void* graph, void* stream) {
  for (const Work& work : *static_cast<Queue*>(graph)) enqueue(stream, work);
  return lost;
}
int cuGraphExecDestroy(void* graph) {
  delete static_cast<Queue*>(graph);
  return lost;
}
int cuGraphDestroy(void*) { return lost; }
int cuEventCreate(void** event, unsigned) {
  *event = new Event;
  return lost;
}
int cuEventRecord(Event* event, void* stream) {
  event->stream = stream;
  return enqueue(stream, [event] {
    event->when = Clock::now();
    return 0;
  });
}
int cuEventSynchronize(Event* event) {
  run(event->stream);
  return lost;
}
int cuEventElapsedTime(float* milliseconds, const Event* begin, const Event* end) {
  *milliseconds = std::chrono::duration<float, std::milli>(end->when - begin->when).count();
  return lost;
}
}

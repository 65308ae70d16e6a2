// SPDX-License-Identifier: Apache-2.0
#include "tensorrt/log.h"

#include <atomic>
#include <cstdint>
#include <cstdio>

// A library that TensorRT loads need not be linked with it, so this may stay undefined.
extern "C" nvinfer1::ILogger* getLogger() noexcept __attribute__((weak));

namespace adaptive_k::tensorrt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> g_finder{nullptr};

// TensorRT 11 put a base class under ILogger and ILoggerFinder and so moved their methods. Loaded
// by the other major version, this library must not take one method for another. What each layout
// has in the first place tells them apart: 10 the method that returns a logger's address, 11 the
// one that returns the interface's language, a small number.
bool has_our_layout(nvinfer1::ILoggerFinder* finder) {
#if NV_TENSORRT_MAJOR >= 11
  const auto language = static_cast<int32_t>(finder->getAPILanguage());
  return language == static_cast<int32_t>(nvinfer1::APILanguage::kCPP) ||
         language == static_cast<int32_t>(nvinfer1::APILanguage::kPYTHON);
#else
  constexpr uintptr_t kFirstPage = 4096;  // no object is there
  return reinterpret_cast<uintptr_t>(finder->findLogger()) >= kFirstPage;
#endif
}

nvinfer1::ILogger* find_logger() {
  // Asked every time, since an application may change its logger.
  nvinfer1::ILoggerFinder* finder = g_finder.load();
  if (finder != nullptr && has_our_layout(finder)) {
    if (nvinfer1::ILogger* logger = finder->findLogger()) return logger;
  }
  return getLogger != nullptr ? getLogger() : nullptr;
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { g_finder.store(finder); }

void log(Severity severity, const std::string& sentence) noexcept {
  try {
    if (nvinfer1::ILogger* logger = find_logger()) {
      logger->log(severity, sentence.c_str());
      return;
    }
  } catch (...) {  // a finder that throws must not take the sentence with it
  }
  if (severity <= Severity::kWARNING) std::fprintf(stderr, "%s\n", sentence.c_str());
}

}  // namespace adaptive_k::tensorrt

// SPDX-License-Identifier: Apache-2.0
#include "log.h"

#include <atomic>
#include <cstdio>

// A library that TensorRT loads need not be linked with it, so this may stay undefined.
extern "C" nvinfer1::ILogger* getLogger() noexcept __attribute__((weak));

namespace adaptive_k::tensorrt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> g_finder{nullptr};

nvinfer1::ILogger* find_logger() {
  // Asked every time, since an application may change its logger.
  if (nvinfer1::ILoggerFinder* finder = g_finder.load()) {
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

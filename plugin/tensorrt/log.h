// SPDX-License-Identifier: Apache-2.0
// Where the plugin's sentences go: to the logger of the TensorRT that loaded it.
#pragma once

#include <NvInfer.h>

#include <string>

namespace adaptive_k::tensorrt {

using Severity = nvinfer1::ILogger::Severity;

// TensorRT hands over its logger when it loads the library; null takes it back.
void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// Uses the finder's logger, else TensorRT's global one where the process has it, else stderr.
void log(Severity severity, const std::string& sentence) noexcept;

}  // namespace adaptive_k::tensorrt

# SPDX-License-Identifier: Apache-2.0
# Finds the one OpenVINO that the operator is built for, and the TBB that comes with it. The
# extension is tied to OpenVINO's C++ ABI, which holds for a single version only.
set(ADAPTIVE_K_OPENVINO_VERSION 2026.4.1)

if(NOT OpenVINO_DIR)
  execute_process(
    COMMAND
      "${Python_EXECUTABLE}" -c
      "import importlib.util as u; print(u.find_spec('openvino').submodule_search_locations[0])"
    OUTPUT_VARIABLE openvino_wheel OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(openvino_wheel)
    set(OpenVINO_DIR "${openvino_wheel}/cmake")
  endif()
endif()

find_package(OpenVINO QUIET COMPONENTS Runtime ONNX)
if(NOT OpenVINO_FOUND)
  message(FATAL_ERROR "OpenVINO was not found: install it for ${Python_EXECUTABLE} (pip install "
                      "openvino==${ADAPTIVE_K_OPENVINO_VERSION}) or set OpenVINO_DIR.")
endif()
if(NOT OpenVINO_VERSION VERSION_EQUAL ADAPTIVE_K_OPENVINO_VERSION)
  message(FATAL_ERROR "OpenVINO ${OpenVINO_VERSION} in ${OpenVINO_DIR} does not fit: the operator is "
                      "built for the ABI of ${ADAPTIVE_K_OPENVINO_VERSION} (pip install "
                      "openvino==${ADAPTIVE_K_OPENVINO_VERSION}).")
endif()
if(NOT TARGET TBB::tbb)
  find_package(TBB REQUIRED HINTS "${OpenVINO_DIR}")
endif()
message(STATUS "OpenVINO ${OpenVINO_VERSION}: ${OpenVINO_DIR}")

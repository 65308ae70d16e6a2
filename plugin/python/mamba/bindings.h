// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>

// Adds Mamba2 to the module.
void bind_mamba(nanobind::module_& m);

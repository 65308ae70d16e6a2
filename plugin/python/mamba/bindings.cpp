// SPDX-License-Identifier: Apache-2.0
#include "python/bindings.h"

#include "cpu/mamba/compute.h"
#include "python/threads.h"

namespace adaptive_k::python {
namespace {

void mamba2(const nb::dict& attributes, const Inputs& inputs, std::optional<int> num_threads,
            const FloatsOut& y) {
  const MambaParams params = params_of<Mamba>(attributes);
  named<Mamba>([&] {
    const MambaSizes sizes =
        check_shapes(params, shapes_of<Mamba>(inputs, WeightFormat::kAsHiddenStates));
    const cpu::MambaArguments arguments(sizes, addresses_of<Mamba>(inputs));
    if (static_cast<int64_t>(y.size()) != sizes.tokens * sizes.heads * sizes.head_dim)
      throw std::invalid_argument("the output array has the wrong size");
    const nb::gil_scoped_release release;
    run_with_threads(num_threads, [&] { cpu::mamba2(params, arguments, y.data()); });
  });
}

}  // namespace

void bind_mamba(nb::module_& m) {
  m.def("mamba2", &mamba2, nb::arg(), nb::arg(), nb::arg().none(), nb::arg());
}

}  // namespace adaptive_k::python

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

// The sizes of a step on whatever device, as moe_sizes gives a layer's.
nb::dict mamba_sizes(const nb::dict& attributes, const std::vector<Shape>& shapes) {
  const MambaParams params = params_of<Mamba>(attributes);
  const MambaSizes sizes = named<Mamba>([&] {
    Shapes<Mamba> in;
    for (size_t i = 0; i < in.size(); ++i) in[i] = shapes.at(i);
    return check_shapes(params, in);
  });
  nb::dict out;
  out["tokens"] = sizes.tokens;
  out["sequences"] = sizes.sequences;
  out["slots"] = sizes.slots;
  out["heads"] = sizes.heads;
  out["head_dim"] = sizes.head_dim;
  out["state_size"] = sizes.state_size;
  out["taps"] = sizes.taps;
  return out;
}

}  // namespace

void bind_mamba(nb::module_& m) {
  m.def("mamba2", &mamba2, nb::arg(), nb::arg(), nb::arg().none(), nb::arg());
  m.def("mamba_sizes", &mamba_sizes);
}

}  // namespace adaptive_k::python

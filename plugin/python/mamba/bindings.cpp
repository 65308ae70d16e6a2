// SPDX-License-Identifier: Apache-2.0
// Mamba2 for Python; the package's mamba.py checks types and allocates the output.
#include "python/mamba/bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <stdexcept>

#include "cpu/mamba/compute.h"
#include "python/threads.h"

namespace nb = nanobind;
namespace cpu = adaptive_k::cpu;

namespace {

using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Integers = nb::ndarray<const int32_t, nb::c_contig, nb::device::cpu>;
using FloatsOut = nb::ndarray<float, nb::c_contig, nb::device::cpu>;

template <typename Array>
cpu::Shape shape_of(const Array& array) {
  std::vector<int64_t> shape;
  for (size_t i = 0; i < array.ndim(); ++i) shape.push_back(static_cast<int64_t>(array.shape(i)));
  return shape;
}

void mamba2(const Floats& conv_input, const Floats& dt, const Integers& subsequence_begins,
            const Integers& past_lens, const Integers& state_slots, const Floats& conv_weight,
            const Floats& conv_bias, const Floats& a, const Floats& d, const Floats& dt_bias,
            const FloatsOut& conv_state, const FloatsOut& ssm_state, int n_groups, float dt_min,
            float dt_max, std::optional<int> num_threads, const FloatsOut& y) {
  const adaptive_k::MambaParams params{n_groups, dt_min, dt_max};
  const cpu::Shape shapes[cpu::kMambaInputs] = {
      shape_of(conv_input), shape_of(dt),          shape_of(subsequence_begins),
      shape_of(past_lens),  shape_of(state_slots), shape_of(conv_weight),
      shape_of(conv_bias),  shape_of(a),           shape_of(d),
      shape_of(dt_bias),    shape_of(conv_state),  shape_of(ssm_state)};
  cpu::MambaArguments args;
  args.sizes = cpu::check_mamba_shapes(params, shapes);
  args.conv_input = conv_input.data();
  args.dt = dt.data();
  args.subsequence_begins = subsequence_begins.data();
  args.past_lens = past_lens.data();
  args.state_slots = state_slots.data();
  args.conv_weight = conv_weight.data();
  args.conv_bias = conv_bias.data();
  args.a = a.data();
  args.d = d.data();
  args.dt_bias = dt_bias.data();
  args.conv_state = conv_state.data();
  args.ssm_state = ssm_state.data();
  if (static_cast<int64_t>(y.size()) != args.sizes.tokens * args.sizes.heads * args.sizes.head_dim)
    throw std::invalid_argument("Mamba2: the output array has the wrong size");
  const nb::gil_scoped_release release;
  run_with_threads(num_threads, [&] { cpu::mamba2(params, args, y.data()); });
}

}  // namespace

void bind_mamba(nb::module_& m) {
  m.def("mamba2", &mamba2, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg().none(), nb::arg());
}

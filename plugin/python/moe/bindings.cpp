// SPDX-License-Identifier: Apache-2.0
#include "python/bindings.h"

#include "cpu/machine.h"
#include "cpu/moe/compute.h"
#include "python/threads.h"

namespace adaptive_k::python {
namespace {

cpu::MoeArguments arguments_of(const MoeParams& params, const Inputs& inputs) {
  cpu::MoeArguments arguments;
  named<Moe>([&] {
    arguments.sizes = check_shapes(params, shapes_of<Moe>(inputs, params.weight_format));
    check_cpu_weights(params, arguments.sizes);
  });
  arguments.inputs = addresses_of<Moe>(inputs);
  return arguments;
}

// The columns of route's lists, once the inputs are known to fit.
int32_t routing_width(const nb::dict& attributes, const Inputs& inputs) {
  const MoeParams params = params_of<Moe>(attributes);
  return largest_k(params, static_cast<int32_t>(arguments_of(params, inputs).sizes.experts));
}

void route(const nb::dict& attributes, const Inputs& inputs, const IntegersOut& k,
           const FloatsOut& entropy, const IntegersOut& experts, const FloatsOut& weights) {
  const MoeParams params = params_of<Moe>(attributes);
  const cpu::MoeArguments arguments = arguments_of(params, inputs);
  const auto tokens = static_cast<size_t>(arguments.sizes.tokens);
  const size_t room = tokens * largest_k(params, static_cast<int32_t>(arguments.sizes.experts));
  require_room<Moe>(k.size() == tokens && entropy.size() == tokens && experts.size() == room &&
                    weights.size() == room);
  const nb::gil_scoped_release release;
  cpu::route(params, arguments, k.data(), entropy.data(), experts.data(), weights.data());
}

void moe(const nb::dict& attributes, const Inputs& inputs, std::optional<int> num_threads,
         const FloatsOut& output, const IntegersOut& k, const FloatsOut& entropy,
         const std::optional<IntegersOut>& expert_load) {
  const MoeParams params = params_of<Moe>(attributes);
  cpu::MoeArguments arguments = arguments_of(params, inputs);
  const auto tokens = static_cast<size_t>(arguments.sizes.tokens);
  require_room<Moe>(output.size() == tokens * arguments.sizes.hidden && k.size() == tokens &&
                    entropy.size() == tokens);
  if (expert_load) {
    require_room<Moe>(expert_load->size() == static_cast<size_t>(arguments.sizes.experts));
    arguments.expert_load = reinterpret_cast<uint32_t*>(expert_load->data());
  }
  const nb::gil_scoped_release release;
  run_with_threads(num_threads,
                   [&] { cpu::moe(params, arguments, output.data(), k.data(), entropy.data()); });
}

// The sizes of a layer of whatever device, and the largest k, under the names that the CUDA
// library's C interface has for them. weight_bits is of an element of the weights' tensors.
nb::dict moe_sizes(const nb::dict& attributes, const std::vector<Shape>& shapes,
                   int64_t weight_bits) {
  const MoeParams params = params_of<Moe>(attributes);
  const MoeSizes sizes = named<Moe>([&] {
    Shapes<Moe> in;
    for (size_t i = 0; i < in.size(); ++i)
      in[i] = Moe::kInputs[i].type == TypeRule::kWeights
                  ? in_values(shapes.at(i), weight_bits,
                              bits_of(stored_format(params.weight_format, WeightFormat::kFloat32)))
                  : shapes.at(i);
    return check_shapes(params, in);
  });
  nb::dict out;
  out["tokens"] = sizes.tokens;
  out["hidden"] = sizes.hidden;
  out["intermediate"] = sizes.intermediate;
  out["experts"] = sizes.experts;
  out["local_experts"] = sizes.local_experts;
  out["policies"] = sizes.policies;
  out["choices"] = sizes.choices;
  out["group_size"] = sizes.group_size;
  out["largest_k"] = largest_k(params, static_cast<int32_t>(sizes.experts));
  return out;
}

}  // namespace

void bind_moe(nb::module_& m) {
  m.def("instruction_set", &cpu::instruction_set_name);
  m.def("routing_width", &routing_width);
  m.def("route", &route);
  m.def("moe", &moe, nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg() = nb::none());
  m.def("moe_sizes", &moe_sizes);
}

}  // namespace adaptive_k::python

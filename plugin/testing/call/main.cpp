// SPDX-License-Identifier: Apache-2.0
// Runs the operators of plugin/cpu on what it reads from standard input, until that ends.
//
// A request is lines of text: the call (moe, route, mamba2 or instruction_set); its threads, 0 for
// all; the number of attributes and a line "name value" for each; the number of inputs and a line
// "place element_bytes dimensions..." for each. The inputs' bytes follow. The answer is a line
// "ok BYTES" and so many bytes, the outputs one after another, or a line "error SENTENCE".
#include <cstring>
#include <iostream>
#include <sstream>

#include "cpu/machine.h"
#include "cpu/mamba/compute.h"
#include "cpu/moe/compute.h"
#include "operator/table.h"
#include "python/threads.h"

namespace adaptive_k::testing {
namespace {

struct Input {
  int32_t place;
  int64_t element_bytes;
  std::vector<int64_t> shape;
  std::vector<char> bytes;
};

struct Request {
  std::string call;
  std::optional<int> threads;
  std::map<std::string, std::string> attributes;
  std::vector<Input> inputs;
};

std::istringstream next_line() {
  std::string line;
  if (!std::getline(std::cin, line)) throw std::runtime_error("the request ends too early");
  return std::istringstream(line);
}

template <typename T>
T read_value(std::istream&& stream) {
  T value;
  if (!(stream >> value)) throw std::runtime_error("the request is not as it must be");
  return value;
}

Request read_request(const std::string& call) {
  Request request;
  request.call = call;
  const int threads = read_value<int>(next_line());
  if (threads > 0) request.threads = threads;
  for (auto left = read_value<int64_t>(next_line()); left > 0; --left) {
    std::istringstream line = next_line();
    std::string name, value;
    line >> name >> value;
    request.attributes[name] = value;
  }
  request.inputs.resize(read_value<size_t>(next_line()));
  for (Input& input : request.inputs) {
    std::istringstream line = next_line();
    line >> input.place >> input.element_bytes;
    int64_t count = input.element_bytes;
    for (int64_t size; line >> size; count *= size) input.shape.push_back(size);
    input.bytes.resize(count);
  }
  for (Input& input : request.inputs)
    std::cin.read(input.bytes.data(), static_cast<std::streamsize>(input.bytes.size()));
  return request;
}

template <typename Op>
typename Op::Params params_of(const Request& request) {
  typename Op::Params params;
  for (const auto& a : Op::kAttributes) {
    const auto found = request.attributes.find(a.name);
    if (found == request.attributes.end()) continue;
    if (a.type == AttributeType::kWord)
      set_word(a, "attribute", found->second, &params);
    else
      a.set(&params, a.type == AttributeType::kReal
                         ? std::stof(found->second)
                         : static_cast<double>(std::stol(found->second)));
  }
  return params;
}

template <typename Op>
Shapes<Op> shapes_of(const Request& request, WeightFormat format) {
  Shapes<Op> shapes;
  for (const Input& input : request.inputs)
    shapes[input.place] = Op::kInputs[input.place].type == TypeRule::kWeights
                              ? in_values(input.shape, input.element_bytes * 8,
                                          bits_of(stored_format(format, WeightFormat::kFloat32)))
                              : input.shape;
  return shapes;
}

template <typename Op>
Addresses<typename Op::Input> addresses_of(const Request& request) {
  Addresses<typename Op::Input> addresses;
  for (const Input& input : request.inputs) addresses.at[input.place] = input.bytes.data();
  return addresses;
}

template <typename T>
void append(const std::vector<T>& values, std::string* answer) {
  answer->append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

std::string moe(const Request& request) {
  const MoeParams params = params_of<Moe>(request);
  cpu::MoeArguments arguments;
  arguments.sizes = check_shapes(params, shapes_of<Moe>(request, params.weight_format));
  arguments.inputs = addresses_of<Moe>(request);
  const int64_t tokens = arguments.sizes.tokens;
  std::vector<int32_t> k(tokens);
  std::vector<float> entropy(tokens);
  std::string answer;
  if (request.call == "route") {
    const auto width = largest_k(params, static_cast<int32_t>(arguments.sizes.experts));
    std::vector<int32_t> experts(tokens * width);
    std::vector<float> weights(tokens * width);
    cpu::route(params, arguments, k.data(), entropy.data(), experts.data(), weights.data());
    append(k, &answer);
    append(entropy, &answer);
    append(experts, &answer);
    append(weights, &answer);
    return answer;
  }
  check_cpu_weights(params, arguments.sizes);
  std::vector<float> output(tokens * arguments.sizes.hidden);
  run_with_threads(request.threads,
                   [&] { cpu::moe(params, arguments, output.data(), k.data(), entropy.data()); });
  append(output, &answer);
  append(k, &answer);
  append(entropy, &answer);
  return answer;
}

// The states, which are inputs that are updated, follow the output.
std::string mamba2(const Request& request) {
  const MambaParams params = params_of<Mamba>(request);
  const MambaSizes sizes =
      check_shapes(params, shapes_of<Mamba>(request, WeightFormat::kAsHiddenStates));
  const cpu::MambaArguments arguments(sizes, addresses_of<Mamba>(request));
  std::vector<float> y(sizes.tokens * sizes.heads * sizes.head_dim);
  run_with_threads(request.threads, [&] { cpu::mamba2(params, arguments, y.data()); });
  std::string answer;
  append(y, &answer);
  for (const MambaInput state : {MambaInput::kConvState, MambaInput::kSsmState})
    for (const Input& input : request.inputs)
      if (input.place == static_cast<int32_t>(state)) append(input.bytes, &answer);
  return answer;
}

std::string answer_to(const Request& request) {
  if (request.call == "instruction_set") return cpu::instruction_set_name();
  if (request.call == "mamba2") return named<Mamba>([&] { return mamba2(request); });
  if (request.call == "moe" || request.call == "route")
    return named<Moe>([&] { return moe(request); });
  throw std::runtime_error("there is no call " + request.call);
}

}  // namespace
}  // namespace adaptive_k::testing

int main() {
  std::ios::sync_with_stdio(false);
  for (std::string call; std::getline(std::cin, call);) {
    const adaptive_k::testing::Request request = adaptive_k::testing::read_request(call);
    try {
      const std::string answer = adaptive_k::testing::answer_to(request);
      std::cout << "ok " << answer.size() << '\n' << answer << std::flush;
    } catch (const std::invalid_argument& error) {
      std::cout << "error " << error.what() << '\n' << std::flush;
    }
  }
  return 0;
}

// The CUDA kernels, run on the host, against the engine of csrc/cpu (whose own tests are tests/cpp): every
// result of every kind of call, in double. Arguments: threads of a block; n, to run every n-th call alone,
// and in one order of the threads: sanitizers take their time.
#include "cuda/emulation/device.h"
//
#include "calls.h"

namespace {

// With some 20 examples: tiles of 4 x 4, and a second round of tiles.
constexpr int64_t large_width = 70;
Program large() {
  programs::Net p(1, 9);
  const int64_t h = p.norm(Kind::layer_norm, p.linear(0, large_width), 0.1, true);
  p.fold(0.1);
  p.linear(p.activation(Kind::tanh, p.linear(h, large_width)), 3);
  return p;
}

}  // namespace

int main(int count, char** arguments) {
  const int64_t threads = count > 1 ? std::atoi(arguments[1]) : 0;
  const int nth = count > 2 ? std::atoi(arguments[2]) : 1;
  using namespace programs;
  const std::pair<const char*, Program> models[] = {
      {"mlp", mlp(4)},        {"norms", norms(5)},
      {"chain", chain()},     {"gates", gates()},
      {"columns", columns()}, {"fan", fan()},
      {"tied", tied(false)},  {"tied and frozen", tied(true)},
      {"tiny", tiny()},       {"no parameters", no_parameters()},
      {"large", large()},
  };
  std::vector<const char*> orders = {"forward", "reverse", "random:1"};
  if (nth > 1) orders = {"forward"};
  int number = 0;
  for (const auto& [name, model] : models) {
    for (const How& how : all) {
      ++number;
      if (number % nth != 0) continue;
      Program p = model;
      p.loss = number % 2 ? fastmaml::Loss::mse : fastmaml::Loss::cross_entropy;
      if (p.buffers[p.output].R > 1) p.loss = fastmaml::Loss::mse;
      p.label_smoothing = number % 4 == 0 ? 0.1 : 0;
      const bool is_large = p.buffers[p.ops.empty() ? 0 : p.ops[0].out].C == large_width;
      const int64_t tasks = 2 + (number % 3 == 0);  // three are more than there are teams at once
      const Data d = draw(p, how, nth > 5 ? 1 : tasks, is_large ? 21 : 5, is_large ? 23 : 3);
      check_call<double>(name, p, how, d, cuda::ieee, threads, orders, 1e-10);
    }
  }
  std::printf("ok\n");
}

// The products on tensor cores, run on the host, against the engine of csrc/cpu in double. Arguments: threads
// of a block; n, to run every n-th call alone, and in one order of the threads.
//
// Small whole numbers first: rounding keeps them, and float sums of their products are exact, so every bit
// must be right. Then real ones, with TF32 operands, which are off by 2^-11 of themselves each: a result of
// these calls comes through up to 6 sweeps with 6 products one after another.
#include "cuda/emulation/device.h"
//
#include "calls.h"

namespace {

constexpr double tf32_bound = 6 * 6 * 2 / 2048.;

const How derivatives[] = {
    {"output", Tail::output, 0},
    {"output, own parameters", Tail::output, 0, 0, false, true},
    {"curvature", Tail::curvature, 0, 0, false, false, false, false, true},
};

// A relu between two layers: its slope 1/2 keeps whole numbers short.
Program two_layers(int64_t I, int64_t H, int64_t O) {
  programs::Net p(1, I);
  const int64_t h = p.linear(0, H);
  p.fold(0.5);
  p.linear(h, O, false);
  p.loss = fastmaml::Loss::mse;
  return p;
}

// -1, 0 and 1, zero in two of three
void make_whole(Vector& v) {
  for (double& a : v) {
    const unsigned drawn = generator() % 6;
    a = drawn == 0 ? 1 : drawn == 1 ? -1 : 0;
  }
}
Data whole_numbers(const Program& p, const How& how, int64_t N, int64_t Q) {
  Data d = draw(p, how, 2, N, Q);
  for (Vector* v : {&d.x_q, &d.y_q, &d.seed}) make_whole(*v);
  for (Vector& v : d.params) make_whole(v);
  d.grad_loss = {1, -2};
  return d;
}

void check_whole_numbers(const char* name, cuda::Precision precision, int64_t threads,
                         const std::vector<const char*>& orders, int nth) {
  int number = 0;
  // the last takes more tiles than a block of 64 has warps, and two of each along every axis
  const int64_t sizes[][5] = {{3, 5, 1, 4, 1}, {17, 9, 4, 4, 2}, {8, 16, 8, 4, 16}, {33, 21, 2, 4, 32}};
  for (const auto& [I, H, O, N, Q] : sizes)
    for (const How& how : derivatives) {
      if (++number % nth != 0) continue;
      const Program p = two_layers(I, H, O);
      const std::string at = ", widths " + std::to_string(I) + " " + std::to_string(H);
      check_call<float>(name + at, p, how, whole_numbers(p, how, N, Q), precision, threads, orders, 0);
    }
}

}  // namespace

int main(int count, char** arguments) {
  const int64_t threads = count > 1 ? std::atoi(arguments[1]) : 0;
  const int nth = count > 2 ? std::atoi(arguments[2]) : 1;
  std::vector<const char*> orders = {"forward", "reverse", "random:1"};
  if (nth > 1) orders = {"forward"};
  check_whole_numbers("tf32", cuda::tf32, threads, orders, nth);
  check_whole_numbers("bf16", cuda::bf16, threads, orders, nth);
  const std::pair<const char*, Program> models[] = {
      {"mlp", programs::mlp(4)}, {"tied", programs::tied(false)}, {"columns", programs::columns()}};
  int number = 0;
  for (const auto& [name, model] : models)
    for (const How& how : all) {
      if (++number % nth != 0) continue;
      Program p = model;
      p.loss = fastmaml::Loss::mse;
      check_call<float>(name, p, how, draw(p, how, 2), cuda::tf32, threads, orders, tf32_bound);
    }
  std::printf("ok\n");
}

// One call of the engine, free of torch types: K inner steps on the support set, then a tail, then the
// adjoint.
#pragma once
#include <string>

#include "plan.h"

namespace fastmaml {

// What comes after the inner steps.
enum class Tail {
  weights,    // out = W_K; with a seed: its vector-Jacobian product, v_K = seed
  output,     // out = the program's output on the query set at W_K; with a seed (a gradient of out): its
              // vector-Jacobian product
  loss,       // the query loss, and its gradient if asked
  curvature,  // grad_loss * g + H seed on the query set
};

struct Set {
  const void* x = nullptr;       // [T, n, ...]
  const void* target = nullptr;  // [T, n, ...], int64 [T, n] for class indices
  const void* weight = nullptr;  // [T, n] or null
  int64_t n = 0;
};

struct Request {
  const Program* program = nullptr;
  bool is_double = false;
  Tail tail = Tail::loss;
  int64_t T = 0, K = 0;
  int64_t checkpoint_every = 0;  // 0: keep every W_k
  bool first_order = false;
  bool plain = true;  // W -= a g; else M <- momentum M + g min(1, max_norm / |g|) + weight_decay W, W -= a M
  double momentum = 0, weight_decay = 0, max_norm = 0;
  std::vector<double> step_weights;  // of the losses of Tail::loss after steps 1 to K; empty: the last alone
  std::vector<char> factored;        // for each op: a linear layer whose weights stay factors; empty: none
  double scale = 1;                  // of the losses and the gradients of Tail::loss
  bool per_task = false;             // gradients [T, ..] instead of summed [1, ..]
  int threads = 1;

  std::vector<const void*> params;
  std::vector<char> own;     // per parameter: one for each task
  const void* lr = nullptr;  // [K, S]
  int64_t S = 1;             // 1, params or P
  Set support, query;
  const void* seed = nullptr;       // [T, P], or the shape of out
  const void* grad_loss = nullptr;  // [T]

  // outputs; null: not wanted
  void* out = nullptr;
  void* total_loss = nullptr;  // [], in place of loss: the sum over tasks
  void* loss = nullptr;        // [T]
  void* grads = nullptr;       // [T or 1, P]
  void* grad_lr = nullptr;     // [T or 1, K, S]
  void* grad_x_s = nullptr;
  void* grad_x_q = nullptr;
};

// Runs it on the widest instruction set of this machine, no wider than FASTMAML_ISA if that is set.
void run(const Request& request);
std::string isa();  // throws std::invalid_argument if FASTMAML_ISA names none

}  // namespace fastmaml

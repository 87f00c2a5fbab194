// What a launch hands to its blocks, as plain data: the program with the place of everything in shared
// memory, and the call. Both are kernel parameters, so that they lie in constant memory and nothing is copied
// before.
#pragma once
#include <cstdint>

// What shares a task; code for both is compiled apart, from the same source.
#ifndef FASTMAML_CLUSTER
#  define FASTMAML_CLUSTER 0
#endif
#if FASTMAML_CLUSTER
#  define FASTMAML_TEAM cluster
#else
#  define FASTMAML_TEAM one_block
#endif

namespace fastmaml::cuda {

constexpr int most_ops = 48, most_buffers = most_ops + 1, most_params = 64;

// The numbers are those of csrc/program.h.
enum Kind : int { linear, batch_norm, layer_norm, leaky_relu, tanh_, sigmoid, gelu, silu, add, flatten };
enum Loss : int { no_loss, mse_loss, cross_entropy_loss };
// Of the float operands of products; sums are float, and double is always ieee.
enum Precision : int { ieee, tf32, bf16 };
enum Tail : int { tail_weights, tail_output, tail_loss, tail_curvature };

struct BufferRow {
  int R, C;     // rows and columns of one example
  int ld;       // from row to row; what pads a row up to a whole vector is zero
  int tangent;  // does it move with the parameters?
};

struct ParamRow {
  int O, I;   // [O, I] for a matrix, [1, size] for a vector
  int ld;     // from row to row
  int at;     // in a set of weights in shared memory
  int flat;   // in the flat vector of the Python side, where the rows are I apart
  int space;  // from there to the next parameter
  int adapt, uses;
};

struct OpRow {
  int kind, in0, in1, out;  // in1 is -1 for all but add
  int w, b;                 // parameters, -1 where absent
  // a (leaky) relu that is folded into this op: `act` on its output, `mask` on the gradient that leaves
  int act, mask;
  int tangent_in0, tangent_in1, tangent_out;
  int first_in0, first_in1, first_w, first_b;  // first to write that gradient in a backward pass
  double attr, slope, mask_slope;
};

struct BufferPlace {
  int value, t_value, grad, t_grad;
};

// Batch norm and layer norm keep h and r = 1 / sqrt(variance), and in a dual sweep t_h and t_r / r.
struct SavedPlace {
  int h, r, t_h, t_r;
};

// Where a sweep over n examples has its buffers, in numbers from the start of shared memory.
struct Layout {
  int n;
  BufferPlace buffers[most_buffers];
  SavedPlace saved[most_ops];
};

enum LayoutOf : int { of_step, of_adjoint, of_query, layouts };

struct Table {
  int ops, params, buffers, output, loss;
  int P;                       // numbers of a set of weights in shared memory
  int flat_P;                  // length of the flat vector
  int tied;                    // does an op find the gradient of its parameter begun by another?
  int dual_query;              // has the query set a dual sweep (Tail::curvature)?
  int w, v, u;                 // sets of weights; -1 where there is none
  int x, share;                // the examples of the current set; the share of each in the mean
  int partial;                 // of sums over the block: one number a warp
  int products;                // <v, g> of each parameter: one number a warp
  int numbers;                 // of shared memory in all
  int blocks;                  // that share a task
  int threads, block_numbers;  // of each
  double label_smoothing;
  OpRow op[most_ops];
  ParamRow param[most_params];
  BufferRow buffer[most_buffers];
  Layout layout[layouts];
};

struct Set {
  const void* x;       // [T, n, ...]
  const void* target;  // [T, n, ...], int64 [T, n] for class indices
  const void* weight;  // [T, n] or null
  int64_t n;
};

// One call: K inner steps on the support set, then a tail, then the adjoint (csrc/cpu/request.h). The Python
// side fills it in (fastmaml/backends/cuda.py).
struct Call {
  int64_t T, K, S,
      every;  // S: step sizes of a step: 1, params or flat_P; every: from one stored W_k to the next
  int64_t tail, first_order, precision;
  double scale;  // of the losses and gradients of tail_loss
  const void* params[most_params];
  int64_t own[most_params];  // per parameter: has each task one?
  const void* lr;            // [K, S]
  const void* step_weights;  // [K] or null
  Set support, query;
  const void* seed;       // [T, flat_P], or the shape of out
  const void* grad_loss;  // [T]
  void* stored;           // [T, stored_sets, P]: the W_k of earlier steps; null: not kept
  int64_t stored_sets;
  // outputs, a row for each task; null: not wanted
  void* out;
  void* loss;      // [T]
  void* grads;     // [T, flat_P]
  void* grad_lr;   // [T, K, S], zero
  void* grad_x_s;  // as x, zero
  void* grad_x_q;
};

// Rows of the tasks that are added up, in order: total[i] = rows[0, i] + rows[1, i] + ..
struct Sum {
  const void* rows;  // [T, size]
  void* total;       // [size]
  int64_t size;
};
constexpr int most_sums = 3;
struct Sums {
  Sum of[most_sums];
  int64_t count, T;
};

// The blocks that share a task, for a launch.
struct Team {
  unsigned blocks, threads;
  int bytes;  // of a block's shared memory
};

}  // namespace fastmaml::cuda

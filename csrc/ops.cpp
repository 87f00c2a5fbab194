// The operators that Python sees: shapes checked, outputs made, one Request handed to the engine.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "cpu/request.h"

namespace fastmaml {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;
using Text = std::string;
using Numbers = std::vector<double>;

// The program of this text; stands until this thread's next call. A training step asks for the same one every
// time, and decoding it takes as long as a small network's task.
const Program& decoded(const Text& text) {
  thread_local Text known;
  thread_local Program program;
  if (text != known) {
    known.clear();  // should decoding throw
    program = decode(text);
    known = text;
  }
  return program;
}

// Fills a Request from tensors, and keeps the contiguous copies that it points into alive.
class Builder {
 public:
  Request q;

  Builder(const Tensors& params, const Tensor& x, const Text& program, Tail tail) : like_(x) {
    q.program = &decoded(program);
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                    "x must be float32 or float64");
    q.is_double = x.scalar_type() == ScalarType::Double;
    q.tail = tail;
    q.T = x.size(0);
    q.threads = static_cast<int>(torch::stable::get_num_threads());
    STD_TORCH_CHECK(params.size() == q.program->params.size(), "expected ", q.program->params.size(),
                    " parameters, got ", params.size());
    kept_.reserve(params.size() + 8);  // and the most of other tensors that an operator takes
    q.params.reserve(params.size()), q.own.reserve(params.size());
    for (std::size_t i = 0; i < params.size(); ++i) {
      const Param& p = q.program->params[i];
      const int64_t size = p.O * p.I, got = params[i].numel();
      STD_TORCH_CHECK(got == size || got == q.T * size, "parameter ", i, " must have ", size, " elements or ",
                      q.T, " times as many, got ", got);
      q.params.push_back(data(params[i], "a parameter"));
      q.own.push_back(got != size);
      any_own_ |= got != size;
    }
  }

  Set set(const Tensor& x, const Tensor* y, const MaybeTensor& weight) {
    Set s;
    const Buffer& in = q.program->buffers[0];
    STD_TORCH_CHECK(x.dim() >= 2 && x.size(0) == q.T && x.numel() == q.T * x.size(1) * in.R * in.C,
                    "x does not fit the program");
    s.n = x.size(1);
    s.x = data(x, "x");
    if (y) {
      const Buffer& out = q.program->buffers[q.program->output];
      const bool classes = q.program->loss == Loss::cross_entropy;
      STD_TORCH_CHECK(y->numel() == q.T * s.n * (classes ? 1 : out.R * out.C), "y does not fit the program");
      s.target = data(*y, "y", classes);
      for (int64_t i = 0; classes && i < q.T * s.n; ++i) {
        const int64_t label = static_cast<const int64_t*>(s.target)[i];
        STD_TORCH_CHECK(label >= 0 && label < out.C, "labels must lie in [0, ", out.C, "), got ", label);
      }
    }
    if (weight) {
      STD_TORCH_CHECK(weight->numel() == q.T * s.n, "the weights must have shape [", q.T, ", ", s.n, "]");
      s.weight = data(*weight, "the weights");
    }
    return s;
  }

  const void* data(const Tensor& t, const char* name, bool labels = false) {
    STD_TORCH_CHECK(t.scalar_type() == (labels ? ScalarType::Long : like_.scalar_type()), name,
                    " has the wrong dtype");
    kept_.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
    return kept_.back().const_data_ptr();
  }

  void set_lr(const Tensor& lr, int64_t steps) {
    q.K = steps;
    if (steps == 0) return;
    q.S = lr.size(1);
    STD_TORCH_CHECK(lr.dim() == 2 && lr.size(0) == steps &&
                        (q.S == 1 || q.S == static_cast<int64_t>(q.params.size()) || q.S == q.program->P),
                    "lr must have shape [steps, 1], [steps, parameters] or [steps, ", q.program->P, "]");
    q.lr = data(lr, "lr");
  }

  // Appends an output if it is wanted. Made past the dispatcher, which would look its operator up by name.
  void output(Tensors& outputs, bool wanted, const std::vector<int64_t>& shape, void** at) {
    if (!wanted) return;
    std::vector<int64_t> strides(shape.size(), 1);
    for (std::size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * shape[i];
    AtenTensorHandle made;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(shape.size(), shape.data(), strides.data(),
                                 q.is_double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
                                 aoti_torch_device_type_cpu(), 0, &made));
    outputs.emplace_back(made);
    *at = outputs.back().mutable_data_ptr();
  }
  void loss(Tensors& outputs) { output(outputs, true, {q.T}, &q.loss); }
  void meta_loss(Tensors& outputs, bool per_task) {
    if (per_task) return loss(outputs);
    output(outputs, true, {}, &q.total_loss);
  }
  void grads(Tensors& outputs, bool wanted) { output(outputs, wanted, {rows(), q.program->P}, &q.grads); }
  void grad_lr(Tensors& outputs, bool wanted) {
    output(outputs, wanted && q.K > 0, {rows(), q.K, q.S}, &q.grad_lr);
  }
  void grad_like(Tensors& outputs, bool wanted, const Tensor& x, void** at) {
    std::vector<int64_t> shape(x.dim());
    for (int64_t i = 0; i < x.dim(); ++i) shape[i] = x.size(i);
    output(outputs, wanted, shape, at);
  }
  // the places of the weights that stay factors
  void factor(const std::vector<int64_t>& weights) {
    const Program& p = *q.program;
    for (int64_t w : weights) {
      int64_t uses = 0, at = -1;
      for (std::size_t i = 0; i < p.ops.size(); ++i)
        if (p.ops[i].w == w || p.ops[i].b == w) at = i, ++uses;
      STD_TORCH_CHECK(
          uses == 1 && p.ops[at].kind == Kind::linear && p.ops[at].w == w && !q.own[w] && q.S != p.P,
          "parameter ", w,
          " cannot be factored: it is not the weight of one linear layer, shared by all "
          "tasks, with one step size");
      q.factored.resize(p.ops.size());
      q.factored[at] = 1;
    }
  }
  // fastmaml.SGD.rule; empty for plain descent
  void set_rule(const Numbers& rule) {
    if (rule.empty()) return;
    STD_TORCH_CHECK(rule.size() == 3, "expected momentum, weight_decay and max_norm, got ", rule.size(),
                    " numbers");
    q.plain = false, q.momentum = rule[0], q.weight_decay = rule[1], q.max_norm = rule[2];
  }
  void split_tasks(bool per_task) { q.per_task = per_task || any_own_; }

 private:
  int64_t rows() const { return q.per_task ? q.T : 1; }
  Tensor like_;
  Tensors kept_;
  bool any_own_ = false;
};

// Each returns what is wanted of its results, in the order of the flags.

Tensors apply(Tensors params, Tensor x, Text program) {
  Builder b(params, x, program, Tail::output);
  b.q.query = b.set(x, nullptr, {});
  const Buffer& out = b.q.program->buffers[b.q.program->output];
  Tensors outputs;
  b.output(outputs, true, {b.q.T, b.q.query.n, out.R * out.C}, &b.q.out);
  run(b.q);
  return outputs;
}

Tensors apply_backward(Tensors params, Tensor x, Tensor grad_out, Text program, bool grad_params,
                       bool grad_x) {
  Builder b(params, x, program, Tail::output);
  b.q.query = b.set(x, nullptr, {});
  b.q.seed = b.data(grad_out, "grad_out");
  b.split_tasks(false);
  Tensors outputs;
  b.grads(outputs, grad_params);
  b.grad_like(outputs, grad_x, x, &b.q.grad_x_q);
  run(b.q);
  return outputs;
}

Tensors value_and_grad(Tensors params, Tensor x, Tensor y, MaybeTensor weight, Text program) {
  Builder b(params, x, program, Tail::loss);
  b.q.query = b.set(x, &y, weight);
  b.split_tasks(true);
  Tensors outputs;
  b.loss(outputs);
  b.grads(outputs, true);
  run(b.q);
  return outputs;
}

Tensors value_and_grad_backward(Tensors params, Tensor x, Tensor y, MaybeTensor weight, MaybeTensor grad_loss,
                                Tensor v, Text program, bool per_task, bool grad_params, bool grad_x) {
  Builder b(params, x, program, Tail::curvature);
  b.q.query = b.set(x, &y, weight);
  if (grad_loss) b.q.grad_loss = b.data(*grad_loss, "grad_loss");
  b.q.seed = b.data(v, "v");
  b.split_tasks(per_task);
  Tensors outputs;
  b.grads(outputs, grad_params);
  b.grad_like(outputs, grad_x, x, &b.q.grad_x_q);
  run(b.q);
  return outputs;
}

Tensors inner_loop(Tensors params, Tensor lr, Tensor x, Tensor y, MaybeTensor weight, Text program,
                   int64_t steps, Numbers rule) {
  Builder b(params, x, program, Tail::weights);
  b.q.support = b.set(x, &y, weight);
  b.set_lr(lr, steps);
  b.set_rule(rule);
  Tensors outputs;
  b.output(outputs, true, {b.q.T, b.q.program->P}, &b.q.out);
  run(b.q);
  return outputs;
}

Tensors inner_loop_backward(Tensors params, Tensor lr, Tensor x, Tensor y, MaybeTensor weight, Tensor v,
                            Text program, int64_t steps, bool first_order, Numbers rule,
                            int64_t checkpoint_every, bool grad_params, bool grad_lr, bool grad_x) {
  Builder b(params, x, program, Tail::weights);
  b.q.support = b.set(x, &y, weight);
  b.set_lr(lr, steps);
  b.set_rule(rule);
  b.q.seed = b.data(v, "v");
  b.q.first_order = first_order, b.q.checkpoint_every = checkpoint_every;
  b.split_tasks(false);
  Tensors outputs;
  b.grads(outputs, grad_params);
  b.grad_lr(outputs, grad_lr);
  b.grad_like(outputs, grad_x, x, &b.q.grad_x_s);
  run(b.q);
  return outputs;
}

Tensors meta_loss(Tensors params, Tensor lr, Tensor x_s, Tensor y_s, MaybeTensor weight_s, Tensor x_q,
                  Tensor y_q, MaybeTensor weight_q, Text program, int64_t steps, double scale,
                  bool grad_params, bool first_order, int64_t checkpoint_every, bool per_task, bool grad_lr,
                  bool grad_x_s, bool grad_x_q, std::vector<int64_t> factored, Numbers rule,
                  Numbers step_weights) {
  Builder b(params, x_s, program, Tail::loss);
  b.q.support = b.set(x_s, &y_s, weight_s);
  b.q.query = b.set(x_q, &y_q, weight_q);
  b.set_lr(lr, steps);
  b.set_rule(rule);
  STD_TORCH_CHECK(step_weights.empty() || static_cast<int64_t>(step_weights.size()) == steps,
                  "step_weights must hold a number for each step");
  b.q.step_weights = step_weights;
  b.factor(factored);
  b.q.first_order = first_order, b.q.checkpoint_every = checkpoint_every;
  b.q.scale = scale;
  b.split_tasks(per_task);
  Tensors outputs;
  b.meta_loss(outputs, per_task);
  b.grads(outputs, grad_params);
  b.grad_lr(outputs, grad_lr);
  b.grad_like(outputs, grad_x_s, x_s, &b.q.grad_x_s);
  b.grad_like(outputs, grad_x_q, x_q, &b.q.grad_x_q);
  run(b.q);
  return outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY(fastmaml, m) {
  m.def("apply(Tensor[] params, Tensor x, str program) -> Tensor[]");
  m.def(
      "apply_backward(Tensor[] params, Tensor x, Tensor grad_out, str program, "
      "bool grad_params, bool grad_x) -> Tensor[]");
  m.def(
      "value_and_grad(Tensor[] params, Tensor x, Tensor y, Tensor? weight, str program) "
      "-> Tensor[]");
  m.def(
      "value_and_grad_backward(Tensor[] params, Tensor x, Tensor y, Tensor? weight, Tensor? grad_loss, "
      "Tensor v, str program, bool per_task, bool grad_params, bool grad_x) -> Tensor[]");
  m.def(
      "inner_loop(Tensor[] params, Tensor lr, Tensor x, Tensor y, Tensor? weight, str program, int steps, "
      "float[] rule) -> Tensor[]");
  m.def(
      "inner_loop_backward(Tensor[] params, Tensor lr, Tensor x, Tensor y, Tensor? weight, Tensor v, "
      "str program, int steps, bool first_order, float[] rule, int checkpoint_every, bool grad_params, "
      "bool grad_lr, bool grad_x) -> Tensor[]");
  m.def(
      "meta_loss(Tensor[] params, Tensor lr, Tensor x_s, Tensor y_s, Tensor? weight_s, Tensor x_q, "
      "Tensor y_q, Tensor? weight_q, str program, int steps, float scale, bool grad_params, "
      "bool first_order=False, int checkpoint_every=0, bool per_task=False, bool grad_lr=False, "
      "bool grad_x_s=False, bool grad_x_q=False, int[] factored=[], float[] rule=[], "
      "float[] step_weights=[]) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastmaml, CPU, m) {
  m.impl("apply", TORCH_BOX(&apply));
  m.impl("apply_backward", TORCH_BOX(&apply_backward));
  m.impl("value_and_grad", TORCH_BOX(&value_and_grad));
  m.impl("value_and_grad_backward", TORCH_BOX(&value_and_grad_backward));
  m.impl("inner_loop", TORCH_BOX(&inner_loop));
  m.impl("inner_loop_backward", TORCH_BOX(&inner_loop_backward));
  m.impl("meta_loss", TORCH_BOX(&meta_loss));
}

}  // namespace fastmaml

// `import fastmaml._C` loads the library; isa() says which instruction set it runs on.
static PyObject* isa(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(fastmaml::isa().c_str());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
}
static PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "The instruction set that the kernels run on: amx, avx512, avx2 or generic."},
    {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() { return PyModule_Create(&module); }

// The shape that batch norm and layer norm share: groups of numbers brought to mean 0 and variance 1, then
// scaled and shifted.
//   h = (z - M z) r, r = (M (z - M z)^2 + eps)^-1/2, y = w h + b            (M: the mean over the group)
//   grad_z = r (u - M u - h M(h u)),  u = w grad_y
//   t_h = r (t_z - M t_z - h q), q = M(h t_z);  t_r / r = -r q;  t_y = w t_h + t_w h + t_b
//   t_grad_z = (t_r / r) grad_z + r (t_u - M t_u - t_h M(h u) - h M(t_h u + h t_u)),  t_u = t_w grad_y + w
//   t_grad_y
// Ioffe & Szegedy 2015 (statistics of the current set, arXiv 1502.03167); Ba, Kiros & Hinton 2016 (arXiv
// 1607.06450).
#pragma once
#include "elementwise.cuh"
#include "leaky_relu.cuh"

namespace fastmaml::cuda::FASTMAML_TEAM {

// Layer norm (Across): a group is a row, and a warp takes it. Batch norm: a group is a column, and a thread
// takes it, so that a warp reads along the rows.
template <bool Across, class T>
struct Groups {
  int groups, count, ld, first, stride, start, step;

  FASTMAML_DEVICE Groups(int rows, int columns, int ld)
      : groups(Across ? rows : columns),
        count(Across ? columns : rows),
        ld(ld),
        first(Across ? warp() : thread()),
        stride(Across ? warps() : threads()),
        start(Across ? lane() : 0),
        step(Across ? 32 : 1) {}
  FASTMAML_DEVICE int at(int group, int i) const { return Across ? group * ld + i : i * ld + group; }
  FASTMAML_DEVICE int column(int group, int i) const { return Across ? i : group; }
  FASTMAML_DEVICE T mean(T sum) const { return (Across ? warp_sum(sum) : sum) / count; }
};

// zeros in what pads the rows
template <class T>
FASTMAML_DEVICE void pad(Place<T> to, int rows, int columns, int width, int ld) {
  each(rows, width - columns, [&](int row, int c) { to[row * ld + columns + c] = 0; });
}

template <bool Across, bool Dual, class T>
FASTMAML_DEVICE void norm_forward(int number, const OpRow& op, const Pass<T>& p) {
  const int rows = p.rows(op.in0), C = p.columns(op.in0), ld = p.ld(op.in0), width = p.width(op.in0);
  const Groups<Across, T> g(rows, C, ld);
  const SavedPlace& saved = p.layout.saved[number];
  const Place<T> h = shared<T>() + saved.h, r = shared<T>() + saved.r, y = p.value(op.out);
  const Place<T> z = p.value(op.in0), w = p.param(op.w < 0 ? 0 : op.w);
  const Place<T> b = p.param(op.b < 0 ? 0 : op.b);
  const ParamTangent<T> t_w = p.param_tangent(op.w < 0 ? 0 : op.w),
                        t_b = p.param_tangent(op.b < 0 ? 0 : op.b);
  pad(h, rows, C, width, ld);
  pad(y, rows, C, width, ld);
  if (Dual && op.tangent_in0) pad(shared<T>() + saved.t_h, rows, C, width, ld);
  if (Dual) pad(p.t_value(op.out), rows, C, width, ld);
  for (int group = g.first; group < g.groups; group += g.stride) {
    T sum = 0, squares = 0, t_sum = 0, along = 0;
    for (int i = g.start; i < g.count; i += g.step) sum += z[g.at(group, i)];
    const T mean = g.mean(sum);
    for (int i = g.start; i < g.count; i += g.step) {
      const T c = z[g.at(group, i)] - mean;
      squares += c * c;
    }
    const T r_group = 1 / sqrt(g.mean(squares) + T(op.attr));
    for (int i = g.start; i < g.count; i += g.step) {
      const int at = g.at(group, i);
      h[at] = (z[at] - mean) * r_group;
      if (!Dual || !op.tangent_in0) continue;
      t_sum += p.t_value(op.in0)[at];
      along += p.t_value(op.in0)[at] * h[at];
    }
    T t_mean = 0, q = 0;
    if (Dual && op.tangent_in0) t_mean = g.mean(t_sum), q = g.mean(along);
    if (g.start == 0) {
      r[group] = r_group;
      if (Dual && op.tangent_in0) shared<T>()[saved.t_r + group] = -r_group * q;
    }
    for (int i = g.start; i < g.count; i += g.step) {
      const int at = g.at(group, i), c = g.column(group, i);
      const T h_at = h[at];
      T v = h_at, t_v = 0;
      if (op.w >= 0) v *= w[c];
      if (op.b >= 0) v += b[c];
      if constexpr (Dual) {
        if (op.tangent_in0) {
          t_v = r_group * (p.t_value(op.in0)[at] - t_mean - h_at * q);
          shared<T>()[saved.t_h + at] = t_v;
          if (op.w >= 0) t_v *= w[c];
        }
        if (op.w >= 0) t_v += load_tangent(t_w, c, c) * h_at;
        if (op.b >= 0) t_v += load_tangent(t_b, c, c);
        if (op.act) t_v = leaky_relu_grad(t_v, v, T(op.slope));
        if (op.tangent_out) p.t_value(op.out)[at] = t_v;
      }
      if (op.act) v = leaky_relu_of(v, T(op.slope));
      y[at] = v;
    }
  }
}

template <bool Across, bool Dual, class T>
FASTMAML_DEVICE void norm_backward(int number, const OpRow& op, const Pass<T>& p) {
  const int rows = p.rows(op.in0), C = p.columns(op.in0), ld = p.ld(op.in0), width = p.width(op.in0);
  const Groups<Across, T> g(rows, C, ld);
  const SavedPlace& saved = p.layout.saved[number];
  const Place<T> h = shared<T>() + saved.h, r = shared<T>() + saved.r, dy = p.grad(op.out);
  const Place<T> w = p.param(op.w < 0 ? 0 : op.w);
  const ParamTangent<T> t_w = p.param_tangent(op.w < 0 ? 0 : op.w);
  if (op.first_in0) pad(p.grad(op.in0), rows, C, width, ld);
  if (Dual && op.first_in0) pad(p.t_grad(op.in0), rows, C, width, ld);
  for (int group = g.first; group < g.groups; group += g.stride) {
    // u = w dy, and its tangent
    auto u_at = [&](int at, int c) { return op.w >= 0 ? w[c] * dy[at] : dy[at]; };
    auto t_u_at = [&](int at, int c) {
      const T t = p.t_grad(op.out)[at];
      return op.w >= 0 ? w[c] * t + load_tangent(t_w, c, c) * dy[at] : t;
    };
    auto t_h_at = [&](int at) { return op.tangent_in0 ? shared<T>()[saved.t_h + at] : T(0); };
    T sum = 0, along = 0, t_sum = 0, t_along = 0;
    for (int i = g.start; i < g.count; i += g.step) {
      const int at = g.at(group, i), c = g.column(group, i);
      const T u = u_at(at, c);
      sum += u;
      along += u * h[at];
      if constexpr (Dual) {
        const T t_u = t_u_at(at, c);
        t_sum += t_u;
        t_along += t_h_at(at) * u + h[at] * t_u;
      }
    }
    const T mean = g.mean(sum), m = g.mean(along), r_group = r[group];
    T t_mean = 0, t_m = 0, t_r = 0;
    if constexpr (Dual) {
      t_mean = g.mean(t_sum), t_m = g.mean(t_along);
      if (op.tangent_in0) t_r = shared<T>()[saved.t_r + group];
    }
    for (int i = g.start; i < g.count; i += g.step) {
      const int at = g.at(group, i), c = g.column(group, i);
      const T v = u_at(at, c) - mean - h[at] * m;
      put(p.grad(op.in0) + at, r_group * v, op.first_in0);
      if constexpr (Dual) {
        const T t_v = t_r * v + t_u_at(at, c) - t_mean - t_h_at(at) * m - h[at] * t_m;
        put(p.t_grad(op.in0) + at, r_group * t_v, op.first_in0);
      }
    }
  }
}

template <bool Dual, class T>
FASTMAML_DEVICE void norm_param_grads(int number, const OpRow& op, const Pass<T>& p) {
  const SavedPlace& saved = p.layout.saved[number];
  const Place<T> h = shared<T>() + saved.h, d = p.grad(op.out);
  const Place<T> t_d = Dual ? p.t_grad(op.out) : d;
  if (p.wants_param_grad(op.w)) {
    const ColumnTerm<T> g{d, h}, t_g0{t_d, h}, t_g1{d, shared<T>() + saved.t_h};
    if (op.tangent_in0)
      column_sums<Dual, 2>(p, op.w, op.first_w, op.in0, g, t_g0, t_g1);
    else
      column_sums<Dual, 1>(p, op.w, op.first_w, op.in0, g, t_g0, t_g1);
  }
  if (p.wants_param_grad(op.b)) {
    const ColumnTerm<T> g{d, {}}, t_g{t_d, {}};
    column_sums<Dual, 0>(p, op.b, op.first_b, op.in0, g, t_g, t_g);
  }
}

}  // namespace fastmaml::cuda::FASTMAML_TEAM

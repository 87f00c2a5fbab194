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
#include "pass.h"

namespace fastmaml::FASTMAML_ISA {

// A group is walked in `count` vectors, `stride` apart. Batch norm: a vector is a row's part of some columns,
// each lane a group of its own. Layer norm: a row is one group, its vectors the columns, and the lanes are
// summed too.
struct Groups {
  int64_t groups, group_stride, count, stride, size;
  int64_t param_group_stride, param_stride;
  int64_t tail;  // layer norm: columns in the last vector
  int64_t C;     // columns
};

template <bool Across, class T>
FASTMAML_INLINE Vec<T> mean(Vec<T> total, const Groups& g) {
  if constexpr (Across) return splat(sum<T>(total) / T(g.size));
  return total / T(g.size);
}

template <bool Across, class T>
FASTMAML_INLINE Vec<T> trim(Vec<T> v, int64_t i, const Groups& g) {
  if constexpr (Across) return i + 1 == g.count ? first_lanes<T>(v, g.tail) : v;
  return v;
}

template <bool Across, class T>
Groups groups_of(const OpPlan& o, const Pass<T>& p) {
  const int64_t rows = p.rows(o.op.in0), ld = p.ld(o.op.in0), C = p.plan.program.buffers[o.op.in0].C,
                W = lanes<T>, width = p.width(o.op.in0);
  if (Across) return {rows, ld, width / W, W, C, 0, W, C - (width - W), C};
  return {width / W, W, rows, ld, rows, W, 0, 0, C};
}

template <bool Across, class T>
struct NormSaved {
  T* h;  // [rows, ld]; in the tangent frame t_h
  T* r;  // a vector per group; in the tangent frame t_r / r
  NormSaved(const OpPlan& o, const Pass<T>& p, const Frame<T>& f) {
    h = p.saved(o, f);
    r = h + p.rows(o.op.in0) * p.ld(o.op.in0);
  }
};

template <bool Across, bool Dual, class T>
void norm_forward(const OpPlan& o, const Pass<T>& p) {
  constexpr int64_t W = lanes<T>;
  const Op& op = o.op;
  const Groups g = groups_of<Across>(o, p);
  const NormSaved<Across, T> keep(o, p, p.primal);
  const T* w = p.param(op.w);
  const Vec<T> one = splat(T(1));
  if constexpr (!Dual) {
    const T* b = p.param(op.b);
    const T* z = p.value(op.in0);
    T* y = p.out(op.out);
    for (int64_t j = 0; j < g.groups; ++j) {
      const int64_t at = j * g.group_stride, at_param = j * g.param_group_stride;
      Vec<T> total{}, squares{};
      for (int64_t i = 0; i < g.count; ++i) total += load(z + at + i * g.stride);
      const Vec<T> mu = mean<Across, T>(total, g);
      for (int64_t i = 0; i < g.count; ++i) {
        const Vec<T> c = trim<Across, T>(load(z + at + i * g.stride) - mu, i, g);
        squares += c * c;
      }
      Vec<T> r = one / sqrt<T>(mean<Across, T>(squares, g) + T(op.attr));
      if constexpr (!Across) r = first_lanes<T>(r, g.C - j * W);  // else inf in the padding if eps is 0
      store(keep.r + j * W, r);
      for (int64_t i = 0; i < g.count; ++i) {
        const Vec<T> h = trim<Across, T>((load(z + at + i * g.stride) - mu) * r, i, g);
        store(keep.h + at + i * g.stride, h);
        const int64_t k = at_param + i * g.param_stride;
        Vec<T> v = w ? load(w + k) * h : h;
        if (b) v += load(b + k);
        if (op.act) v = leaky_relu<T>(v, op.slope);
        store(y + at + i * g.stride, v);
      }
    }
  } else {
    const NormSaved<Across, T> t_keep(o, p, p.tangent);
    const T* t_w = p.t_param(op.w);
    const T* t_b = p.t_param(op.b);
    const T* t_z = o.tangent_in0 ? p.t_value(op.in0) : nullptr;
    const T* y = p.value(op.out);
    T* t_y = p.t_value(op.out);
    for (int64_t j = 0; j < g.groups; ++j) {
      const int64_t at = j * g.group_stride, at_param = j * g.param_group_stride;
      const Vec<T> r = load(keep.r + j * W);
      Vec<T> total{}, along{};
      if (t_z) {
        for (int64_t i = 0; i < g.count; ++i) {
          const Vec<T> t = load(t_z + at + i * g.stride);
          total += t;
          along += t * load(keep.h + at + i * g.stride);
        }
      }
      const Vec<T> t_mu = mean<Across, T>(total, g), q = mean<Across, T>(along, g);
      store(t_keep.r + j * W, -r * q);
      for (int64_t i = 0; i < g.count; ++i) {
        const int64_t e = at + i * g.stride, k = at_param + i * g.param_stride;
        const Vec<T> h = load(keep.h + e);
        const Vec<T> t_h = t_z ? trim<Across, T>(r * (load(t_z + e) - t_mu - h * q), i, g) : Vec<T>{};
        store(t_keep.h + e, t_h);
        Vec<T> v = w ? load(w + k) * t_h + load(t_w + k) * h : t_h;
        if (t_b) v += load(t_b + k);
        if (op.act) v = leaky_relu_grad<T>(v, load(y + e), op.slope);
        store(t_y + e, v);
      }
    }
  }
}

template <bool Across, bool Dual, class T>
void norm_backward(const OpPlan& o, const Pass<T>& p) {
  constexpr int64_t W = lanes<T>;
  const Op& op = o.op;
  const Groups g = groups_of<Across>(o, p);
  const NormSaved<Across, T> keep(o, p, p.primal);
  const int64_t rows = p.rows(op.in0), ld = p.ld(op.in0), width = p.width(op.in0);
  const T* w = p.param(op.w);
  const T* dy = p.grad(op.out);
  T* dz = p.grad(op.in0);
  const Vec<T> one = splat(T(1));
  const bool wanted = p.wants_grad(o.tangent_in0);
  if constexpr (!Dual) {
    for (int64_t j = 0; wanted && j < g.groups; ++j) {
      const int64_t at = j * g.group_stride, at_param = j * g.param_group_stride;
      Vec<T> total{}, along{};
      for (int64_t i = 0; i < g.count; ++i) {
        const Vec<T> u = load(dy + at + i * g.stride) * (w ? load(w + at_param + i * g.param_stride) : one);
        total += u;
        along += u * load(keep.h + at + i * g.stride);
      }
      const Vec<T> mu = mean<Across, T>(total, g), m = mean<Across, T>(along, g), r = load(keep.r + j * W);
      for (int64_t i = 0; i < g.count; ++i) {
        const int64_t e = at + i * g.stride;
        const Vec<T> u = load(dy + e) * (w ? load(w + at_param + i * g.param_stride) : one);
        const Vec<T> v = trim<Across, T>(r * (u - mu - load(keep.h + e) * m), i, g);
        store(dz + e, o.first_in0 ? v : load(dz + e) + v);
      }
    }
    if (p.wants_param_grad(op.w))
      column_sum<T, 1>(rows, width, ld, {{dy, keep.h}}, p.param_grad(op.w, o.first_w));
    if (p.wants_param_grad(op.b))
      column_sum<T, 1>(rows, width, ld, {{dy, nullptr}}, p.param_grad(op.b, o.first_b));
  } else {
    const NormSaved<Across, T> t_keep(o, p, p.tangent);
    const T* t_w = p.t_param(op.w);
    const T* t_dy = p.t_grad(op.out);
    T* t_dz = p.t_grad(op.in0);
    for (int64_t j = 0; wanted && j < g.groups; ++j) {
      const int64_t at = j * g.group_stride, at_param = j * g.param_group_stride;
      // u = w dy, and its tangent; dz is made anew: the plain pass may not have kept this op's share of it
      Vec<T> total{}, along{}, t_total{}, t_along{};
      for (int64_t i = 0; i < g.count; ++i) {
        const int64_t e = at + i * g.stride, k = at_param + i * g.param_stride;
        const Vec<T> d = load(dy + e), h = load(keep.h + e), wk = w ? load(w + k) : one;
        const Vec<T> u = wk * d, t_u = w ? wk * load(t_dy + e) + load(t_w + k) * d : load(t_dy + e);
        total += u;
        along += u * h;
        t_total += t_u;
        t_along += load(t_keep.h + e) * u + h * t_u;
      }
      const Vec<T> mu = mean<Across, T>(total, g), m = mean<Across, T>(along, g);
      const Vec<T> t_mu = mean<Across, T>(t_total, g), t_m = mean<Across, T>(t_along, g);
      const Vec<T> r = load(keep.r + j * W), t_r = load(t_keep.r + j * W);
      for (int64_t i = 0; i < g.count; ++i) {
        const int64_t e = at + i * g.stride, k = at_param + i * g.param_stride;
        const Vec<T> d = load(dy + e), h = load(keep.h + e), wk = w ? load(w + k) : one;
        const Vec<T> u = wk * d, t_u = w ? wk * load(t_dy + e) + load(t_w + k) * d : load(t_dy + e);
        Vec<T> v = r * (t_r * (u - mu - h * m) + t_u - t_mu - load(t_keep.h + e) * m - h * t_m);
        v = trim<Across, T>(v, i, g);
        store(t_dz + e, o.first_in0 ? v : load(t_dz + e) + v);
      }
    }
    if (p.wants_param_grad(op.w))
      column_sum<T, 2>(rows, width, ld, {{t_dy, keep.h}, {dy, t_keep.h}}, p.param_grad(op.w, o.first_w));
    if (p.wants_param_grad(op.b))
      column_sum<T, 1>(rows, width, ld, {{t_dy, nullptr}}, p.param_grad(op.b, o.first_b));
  }
}

}  // namespace fastmaml::FASTMAML_ISA

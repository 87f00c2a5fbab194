// The products of linear.cuh on tensor cores.
#pragma once
#include "folded.cuh"
#include "mma.cuh"

namespace fastmaml::cuda::FASTMAML_TEAM {

template <bool Dual, Precision P>
FASTMAML_DEVICE void linear_forward_mma(const OpRow& op, const Pass<float>& p) {
  const ParamRow& q = p.table.param[op.w];
  const int rows = p.rows(op.in0), width = p.width(op.out), ldx = p.ld(op.in0), ldy = p.ld(op.out);
  const Place<float> x = p.value(op.in0), w = p.param(op.w);
  const Place<float> t_x = Dual && op.tangent_in0 ? p.t_value(op.in0) : x;
  const ParamTangent<float> t_w = p.param_tangent(op.w);
  each_tile(rows, width, [&](int row, int column) {
    TileSums sum{}, t_sum{};
    multiply_tile<true, Dual, P>(
        row, column, q.I, [&](int n, int i) { return n < rows && i < q.I ? x[n * ldx + i] : 0.f; },
        [&](int n, int i) { return n < rows && i < q.I ? t_x[n * ldx + i] : 0.f; },
        [&](int o, int i) { return o < q.O && i < q.I ? w[o * q.ld + i] : 0.f; },
        [&](int o, int i) { return o < q.O && i < q.I ? load_tangent(t_w, o * q.ld + i, o * q.I + i) : 0.f; },
        op.tangent_in0, true, sum, t_sum);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int o = column + tile_column() + c;
      if (o >= width) continue;
      float bias = 0, t_bias = 0;
      if (op.b >= 0 && o < q.O) {
        bias = p.param(op.b)[o];
        if (Dual) t_bias = load_tangent(p.param_tangent(op.b), o, o);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int n = row + tile_row() + 8 * r;
        if (n < rows) put_y<Dual>(op, p, n * ldy + o, sum[r].at[c] + bias, t_sum[r].at[c] + t_bias);
      }
    }
  });
}

template <bool Dual, Precision P>
FASTMAML_DEVICE void linear_backward_mma(const OpRow& op, const Pass<float>& p) {
  const ParamRow& q = p.table.param[op.w];
  const int rows = p.rows(op.in0), width = p.width(op.in0), ldx = p.ld(op.in0), ldd = p.ld(op.out);
  const Place<float> d = p.grad(op.out), t_d = Dual ? p.t_grad(op.out) : d, w = p.param(op.w);
  const ParamTangent<float> t_w = p.param_tangent(op.w);
  each_tile(rows, width, [&](int row, int column) {
    TileSums sum{}, t_sum{};
    multiply_tile<true, Dual, P>(
        row, column, q.O, [&](int n, int o) { return n < rows && o < q.O ? d[n * ldd + o] : 0.f; },
        [&](int n, int o) { return n < rows && o < q.O ? t_d[n * ldd + o] : 0.f; },
        [&](int i, int o) { return i < q.I && o < q.O ? w[o * q.ld + i] : 0.f; },
        [&](int i, int o) { return i < q.I && o < q.O ? load_tangent(t_w, o * q.ld + i, o * q.I + i) : 0.f; },
        true, true, sum, t_sum);
    const int i = column + tile_column();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int n = row + tile_row() + 8 * r;
      if (n < rows && i < width) put_grad_x<Dual>(op, p, n * ldx + i, sum[r], t_sum[r]);
    }
  });
}

template <bool Plain, bool Dual, Precision P>
FASTMAML_DEVICE void linear_weight_mma(const OpRow& op, const Pass<float>& p) {
  const ParamRow& q = p.table.param[op.w];
  const ParamGrad<float> to = p.param_grad(op.w, op.first_w);
  const int rows = p.rows(op.in0), width = p.width(op.in0), ldx = p.ld(op.in0), ldd = p.ld(op.out);
  const Place<float> x = p.value(op.in0), d = p.grad(op.out);
  const Place<float> t_x = Dual && op.tangent_in0 ? p.t_value(op.in0) : x;
  const Place<float> t_d = Dual ? p.t_grad(op.out) : d;
  float product = 0;
  each_tile(q.O, width, [&](int row, int column) {
    TileSums g{}, t_g{};
    multiply_tile<Plain, Dual, P>(
        row, column, rows, [&](int o, int n) { return o < q.O && n < rows ? d[n * ldd + o] : 0.f; },
        [&](int o, int n) { return o < q.O && n < rows ? t_d[n * ldd + o] : 0.f; },
        [&](int i, int n) { return i < q.I && n < rows ? x[n * ldx + i] : 0.f; },
        [&](int i, int n) { return i < q.I && n < rows ? t_x[n * ldx + i] : 0.f; }, true, op.tangent_in0, g,
        t_g);
    const int i = column + tile_column();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int o = row + tile_row() + 8 * r;
      if (o < q.O && i < width) product += finish<Dual>(to, o * q.ld + i, o * q.I + i, q.I - i, g[r], t_g[r]);
    }
  });
  finish_products(p, op.w, product);
}

}  // namespace fastmaml::cuda::FASTMAML_TEAM

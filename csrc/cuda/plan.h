// A Program laid out in shared memory (host code).
#pragma once
#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../program.h"
#include "table.h"

namespace fastmaml::cuda {

// What the layout depends on, besides the program.
struct Sizes {
  int64_t itemsize;
  int64_t N, Q;       // examples of the support and query sets; 0 where there is none
  int64_t adjoint;    // are gradients wanted?
  int64_t dual_step;  // is there a dual sweep over the support set?
  int64_t curvature;  // is there one over the query set?
  int64_t x_s, x_q;   // are the gradients of x wanted?
  int64_t lr;         // is that of the step sizes?
  int64_t threads;    // of a block; 0: as suits the sizes
  int64_t limit;      // bytes of shared memory that a block can have
  int64_t blocks;     // of a cluster, at most
};

// Numbers in memory from `begin` to `end` of a sweep's time.
struct Interval {
  int* place;
  int64_t size;
  int begin, end;
};

// Gives each a place from `base` on, where nothing else lies at the same time; returns the end of all.
inline int64_t place(std::vector<Interval> all, int64_t base) {
  std::stable_sort(all.begin(), all.end(),
                   [](const Interval& a, const Interval& b) { return a.size > b.size; });
  int64_t end = base;
  for (std::size_t i = 0; i < all.size(); ++i) {
    std::map<int64_t, int64_t> taken;  // begin -> end, of those in the way
    for (std::size_t j = 0; j < i; ++j)
      if (all[j].begin <= all[i].end && all[i].begin <= all[j].end) {
        int64_t& to = taken[*all[j].place];
        to = std::max(to, *all[j].place + all[j].size);
      }
    int64_t at = base;
    for (const auto& [from, to] : taken) {
      if (at + all[i].size <= from) break;
      at = std::max(at, to);
    }
    *all[i].place = static_cast<int>(at);
    end = std::max(end, at + all[i].size);
  }
  return end;
}

class Planner {
 public:
  Planner(const Program& program, const Sizes& sizes, Table& table)
      : p_(program), s_(sizes), t_(table), lanes_(16 / sizes.itemsize) {}

  // by as few blocks as have room for it, or as many as there may be
  void plan() {
    t_ = Table{};
    check();
    rows();
    flags();
    for (t_.blocks = 1;; t_.blocks *= 2) {
      threads();
      fill();
      t_.block_numbers = static_cast<int>(round_up((t_.numbers + t_.blocks - 1) / t_.blocks, lanes_));
      if (t_.block_numbers * s_.itemsize <= s_.limit || 2 * t_.blocks > s_.blocks) return;
    }
  }

 private:
  void fill() {
    int64_t at = 0;
    auto take = [&](int64_t n) {
      const int64_t begin = at;
      at += round_up(n, lanes_);
      return static_cast<int>(begin);
    };
    const int64_t n = std::max(s_.N, s_.Q);
    t_.w = take(t_.P);
    t_.v = s_.adjoint ? take(t_.P) : -1;
    t_.u = s_.curvature || (t_.tied && s_.N > 0) ? take(t_.P) : -1;
    t_.x = take(n * p_.buffers[0].R * t_.buffer[0].ld);
    t_.share = take(n);
    t_.partial = take(2 * 32);
    t_.products = s_.lr ? take(t_.params * t_.blocks * (t_.threads / 32)) : -1;
    int64_t end = at;
    if (s_.N > 0) end = std::max(end, lay_out(of_step, s_.N, false, s_.lr && !s_.dual_step, false, at));
    if (s_.dual_step) end = std::max(end, lay_out(of_adjoint, s_.N, true, true, s_.x_s, at));
    if (s_.Q > 0)
      end = std::max(end, lay_out(of_query, s_.Q, s_.curvature, s_.adjoint || s_.x_q, s_.x_q, at));
    if (end > INT32_MAX / 2) throw std::invalid_argument("the network is far too large");
    t_.numbers = static_cast<int>(end);
  }

  static int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }
  // An odd number of 16-byte vectors, so that vectors of 8 rows below each other lie in different banks.
  int64_t row_length(int64_t n) const {
    const int64_t vectors = round_up(n, lanes_) / lanes_;
    return (vectors % 2 ? vectors : vectors + 1) * lanes_;
  }

  void check() const {
    auto at_most = [](std::size_t n, int most, const char* what) {
      if (n > static_cast<std::size_t>(most))
        throw std::invalid_argument("it takes at most " + std::to_string(most) + " " + what + ", not " +
                                    std::to_string(n));
    };
    at_most(p_.ops.size(), most_ops, "layer ops");
    at_most(p_.params.size(), most_params, "parameters");
    at_most(p_.buffers.size(), most_buffers, "buffers");
  }

  void rows() {
    t_.ops = static_cast<int>(p_.ops.size());
    t_.params = static_cast<int>(p_.params.size());
    t_.buffers = static_cast<int>(p_.buffers.size());
    t_.output = static_cast<int>(p_.output);
    t_.loss = static_cast<int>(p_.loss);
    t_.flat_P = static_cast<int>(p_.P);
    t_.label_smoothing = p_.label_smoothing;
    for (int b = 0; b < t_.buffers; ++b)
      t_.buffer[b] = {int(p_.buffers[b].R), int(p_.buffers[b].C), int(row_length(p_.buffers[b].C)), 0};
    int64_t at = 0;
    for (int i = 0; i < t_.params; ++i) {
      const Param& q = p_.params[i];
      const int64_t O = q.matrix ? q.O : 1, I = q.matrix ? q.I : q.O * q.I, ld = row_length(I),
                    next = i + 1 < t_.params ? p_.params[i + 1].offset : p_.P;
      t_.param[i] = {int(O), int(I), int(ld), int(at), int(q.offset), int(next - q.offset), q.adapt, 0};
      at += O * ld;
      if (at > INT32_MAX / 8) throw std::invalid_argument("the network is far too large");
    }
    t_.P = static_cast<int>(at);
  }

  void flags() {
    for (int i = 0; i < t_.ops; ++i) {
      const Op& from = p_.ops[i];
      OpRow& o = t_.op[i];
      o = {int(from.kind),
           int(from.in0),
           int(from.in1),
           int(from.out),
           int(from.w),
           int(from.b),
           from.act,
           from.mask,
           0,
           0,
           0,
           0,
           0,
           0,
           0,
           from.attr,
           from.slope,
           from.mask_slope};
      o.tangent_in0 = t_.buffer[o.in0].tangent;
      o.tangent_in1 = o.in1 >= 0 && t_.buffer[o.in1].tangent;
      o.tangent_out = o.tangent_in0 || o.tangent_in1 || o.w >= 0 || o.b >= 0;
      t_.buffer[o.out].tangent = o.tangent_out;
    }
    std::vector<char> written(t_.buffers, 0);
    written[t_.output] = 1;  // by the loss
    for (int i = t_.ops; i-- > 0;) {
      OpRow& o = t_.op[i];
      auto first = [&](int b) { return b >= 0 && !std::exchange(written[b], 1); };
      auto first_param = [&](int p) { return p >= 0 && t_.param[p].uses++ == 0; };
      o.first_in0 = first(o.in0);
      o.first_in1 = first(o.in1);
      o.first_w = first_param(o.w);
      o.first_b = first_param(o.b);
      t_.tied |= (o.w >= 0 && !o.first_w) || (o.b >= 0 && !o.first_b);
    }
  }

  // A block of 256 threads where the products of the largest layer are more than 128 tiles of 4 x 4.
  void threads() {
    int64_t most = 0;
    for (const OpRow& o : t_.op)
      if (o.w >= 0 && o.kind == linear)
        most = std::max<int64_t>(most, int64_t(t_.param[o.w].O) * t_.param[o.w].I);
    t_.threads = s_.threads ? int(s_.threads) : most > 128 * 16 || t_.blocks > 1 ? 256 : 128;
  }

  // Time: op i runs forward at i, the loss at `ops`, op i backward at `back(i)`. Its parameters' gradients
  // follow without a barrier before the next op's backward, so what they read must last until that.
  int64_t lay_out(LayoutOf which, int64_t n, bool dual, bool backward, bool x_grad, int64_t base) {
    Layout& layout = t_.layout[which];
    layout.n = static_cast<int>(n);
    backward = backward || which == of_step;
    const int ops = t_.ops, end = 3 * ops + 3;
    auto back = [&](int i) { return ops + 1 + 2 * (ops - 1 - i); };
    std::vector<int> produced(t_.buffers, 0), value_end(t_.buffers, 0), t_value_end(t_.buffers, -1),
        grad_begin(t_.buffers, end), grad_end(t_.buffers, -1);
    std::vector<Interval> all;
    auto until = [](int& last, int time) { last = std::max(last, time); };
    until(value_end[t_.output], ops);
    until(t_value_end[t_.output], ops);
    grad_begin[t_.output] = ops;
    until(grad_end[t_.output], ops);
    for (int i = 0; i < ops; ++i) {
      const OpRow& o = t_.op[i];
      produced[o.out] = i;
      until(value_end[o.out], i);
      until(t_value_end[o.out], i);
      for (int in : {o.in0, o.in1}) {
        if (in < 0) continue;
        until(value_end[in], i);
        until(t_value_end[in], i);
      }
      if (!backward || !(o.tangent_out || x_grad)) continue;
      const int data = back(i), parameters = data + 2;
      if (o.kind == linear) {
        until(value_end[o.in0], parameters);
        until(t_value_end[o.in0], parameters);
      }
      if (o.kind >= leaky_relu && o.kind <= silu) {
        const int from = o.kind == tanh_ || o.kind == sigmoid ? o.out : o.in0;  // F::of_output
        until(value_end[from], data);
        until(t_value_end[from], data);
      }
      until(grad_end[o.out], parameters);
      for (int in : {o.in0, o.in1})
        if (in >= 0 && (t_.buffer[in].tangent || x_grad)) {
          grad_begin[in] = data;  // its last reader comes last here, and first on the way back
          until(grad_end[in], in == 0 ? end : data);
        }
      if (o.kind == batch_norm || o.kind == layer_norm) {
        const int64_t C = t_.buffer[o.in0].C, rows = n * t_.buffer[o.in0].R;
        const int64_t h = rows * t_.buffer[o.in0].ld, r = o.kind == batch_norm ? C : rows;
        SavedPlace& at = layout.saved[i];
        all.push_back({&at.h, h, i, parameters});
        all.push_back({&at.r, r, i, parameters});
        if (!dual || !o.tangent_in0) continue;
        all.push_back({&at.t_h, h, i, parameters});
        all.push_back({&at.t_r, r, i, parameters});
      }
    }
    for (int i = 0; i < ops && !backward; ++i) {  // a forward pass writes them all the same
      const OpRow& o = t_.op[i];
      if (o.kind != batch_norm && o.kind != layer_norm) continue;
      const int64_t rows = n * t_.buffer[o.in0].R;
      all.push_back({&layout.saved[i].h, rows * t_.buffer[o.in0].ld, i, i});
      all.push_back({&layout.saved[i].r, o.kind == batch_norm ? t_.buffer[o.in0].C : rows, i, i});
    }
    for (int b = 0; b < t_.buffers; ++b) {
      const int64_t size = n * t_.buffer[b].R * t_.buffer[b].ld;
      BufferPlace& at = layout.buffers[b];
      at.value = t_.x;
      if (b > 0) all.push_back({&at.value, size, produced[b], value_end[b]});
      if (dual && t_.buffer[b].tangent) all.push_back({&at.t_value, size, produced[b], t_value_end[b]});
      if (grad_end[b] < 0) continue;
      all.push_back({&at.grad, size, grad_begin[b], grad_end[b]});
      if (dual) all.push_back({&at.t_grad, size, grad_begin[b], grad_end[b]});
    }
    for (Interval& i : all) i.size = round_up(i.size, lanes_);
    return place(all, base);
  }

  const Program& p_;
  const Sizes& s_;
  Table& t_;
  const int64_t lanes_;
};

}  // namespace fastmaml::cuda

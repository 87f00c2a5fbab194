"""The C++ tests see faults in every kernel: each of these is planted in a copy of the sources and must be caught."""

import shutil
from pathlib import Path

import pytest
from faults import Build, compiled, missed, run, time_limit

ROOT = Path(__file__).parents[1]
CSRC, TESTS = ROOT / "csrc", ROOT / "tests" / "cpp"
COMPILE = [
    "g++",
    "-std=c++17",
    "-O1",
    "-DFASTMAML_INLINE=inline",
    "-DFASTMAML_EXACT",
    "-Wno-psabi",
    "-pthread",
]

# file of csrc/cpu, text that is in it once, what it becomes
FAULTS = [
    ("matmul.h", "for (int64_t k = 0; k < K; ++k, a += a_col, b += ldb)", "for (int64_t k = 1; k < K; ++k, a += a_col, b += ldb)"),
    ("matmul.h", "return bias ? load(bias + c) : Vec<T>{}", "return Vec<T>{}"),
    ("matmul.h", "if (add) {\n      FASTMAML_UNROLL(j, n) { acc[j] += load(out", "if (false) {\n      FASTMAML_UNROLL(j, n) { acc[j] += load(out"),
    ("matmul.h", "acc[j] = leaky_relu<T>(acc[j], slope)", "acc[j] = leaky_relu<T>(acc[j], T(0))"),
    ("matmul.h", "acc[j] = leaky_relu_grad<T>(acc[j], load(y + W * j), mask_slope)", "acc[j] = acc[j]"),
    ("matmul.h", "acc[j] *= load(scale_each + at + W * j)", "acc[j] *= load(scale_each + W * j)"),
    ("matmul.h", "acc[j] = load(base + at + W * j) + s * acc[j]", "acc[j] = load(base + at + W * j) - s * acc[j]"),
    ("matmul.h", "for (; i < columns; ++i) dots_panel", "for (; i + 1 < columns; ++i) dots_panel"),
    ("matmul.h", "if (add) {\n      FASTMAML_UNROLL(j, n) { acc[j] += load(C", "if (false) {\n      FASTMAML_UNROLL(j, n) { acc[j] += load(C"),
    ("matmul.h", "return bias ? repeat_half(bias + c) : Vec<T>{}", "return Vec<T>{}"),
    ("matmul.h", "two_halves<T>(even, odd) * bv[whole]", "two_halves<T>(even, even) * bv[whole]"),
    ("matmul.h", "one_half<i % 2, T>(shared[i / 2])", "one_half<0, T>(shared[i / 2])"),
    ("matmul.h", "if (M % 2) nn_tile", "if (false) nn_tile"),
    ("matmul.h", "put(1, interleave<2, 1>(ab, cd, lane))", "put(1, interleave<2, 0>(ab, cd, lane))"),
    ("matmul.h", "(is_there(4 * j + q) ? q * ld_from : 0)", "(is_there(4 * j + q) ? (q ^ 1) * ld_from : 0)"),
    ("matmul.h", "if constexpr (!all) v = first_of<T>(v, some, lane);", ""),
    ("matmul.h", "if (k > 0) part.bias = nullptr, part.add = true;", ""),
    ("simd.h", "interleave<2, 0>(low, high, lane) + interleave<2, 1>(low, high, lane)", "interleave<2, 0>(low, high, lane) + interleave<2, 0>(low, high, lane)"),
    ("pass.h", "first && grad_add", "grad_add"),
    ("worker.h", "if (to_grads && slot.uses == 0)", "if (false)"),
    ("pass.h", "acc[j] += load(a + W * j) * load(b + W * j)", "acc[j] += load(a + W * j)"),
    ("plan.h", "o->first_in0 = first(o->op.in0);", "first(o->op.in0), o->first_in0 = true;"),
    ("linear.h", "{p.param(op.w), p.t_param(op.w)},\n                  p.t_value", "{p.param(op.w), p.param(op.w)},\n                  p.t_value"),
    ("linear.h", "times<T, 2>(part, false, rows, {t_d, d}, ldd, {w, t_w}, dx, ldx, e)", "times<T, 2>(part, false, rows, {t_d, t_d}, ldd, {w, t_w}, dx, ldx, e)"),
    ("linear.h", "linear_weight_grad<T, 2>(part, rows, {x, t_x}, ldx, {t_d, d}, ldd, g)", "linear_weight_grad<T, 1>(part, rows, {x}, ldx, {t_d}, ldd, g)"),
    ("linear.h", "linear_weight_grad<T, 1>(part, rows, {x}, ldx, {Dual ? t_d : d}, ldd, g)", "linear_weight_grad<T, 1>(part, rows, {x}, ldx, {d}, ldd, g)"),
    ("norm.h", "r = first_lanes<T>(r, g.C - j * W)", "r = r"),
    ("norm.h", "along += t * load(keep.h + at + i * g.stride);", "along += t;"),
    ("norm.h", "store(t_keep.r + j * W, -r * q);", "store(t_keep.r + j * W, r * q);"),
    ("norm.h", "r * (u - mu - load(keep.h + e) * m)", "r * (u - mu)"),
    ("norm.h", "t_along += load(t_keep.h + e) * u + h * t_u;", "t_along += h * t_u;"),
    ("norm.h", "{{t_dy, keep.h}, {dy, t_keep.h}}", "{{t_dy, keep.h}, {t_dy, t_keep.h}}"),
    ("norm.h", "w ? load(w + k) * t_h + load(t_w + k) * h : t_h", "w ? load(w + k) * t_h : t_h"),
    ("leaky_relu.h", "first = x > T(0) ? splat(T(1)) : splat(slope)", "first = splat(T(1))"),
    ("tanh.h", "second = T(-2) * y * first", "second = T(2) * y * first"),
    ("sigmoid.h", "second = first * (T(1) - T(2) * y)", "second = first * (T(1) - y)"),
    ("sigmoid.h", "at_zero = true", "at_zero = false"),
    ("silu.h", "first = s + x * s1", "first = s - x * s1"),
    ("silu.h", "second = s1 * (T(2) + x", "second = s1 * (T(1) + x"),
    ("gelu.h", "second = density * (T(2) - x * x)", "second = density * (T(1) - x * x)"),
    ("gelu.h", "second = t1 + T(0.5) * x * t2", "second = t1 + x * t2"),
    ("mse.h", "two_s = T(2 * s)", "two_s = T(Dual ? s : 2 * s)"),
    ("cross_entropy.h", "d[c] = s * (d[c] / norm) * (t[c] - along)", "d[c] = s * (d[c] / norm) * t[c]"),
    ("cross_entropy.h", "if (smoothing) expected += smoothing / C * (z[c] - top);", ""),
    ("add.h", "if (p.wants_grad(o.tangent_in1)) pass_on", "if (false) pass_on"),
    ("flatten.h", "t[c] = add ? t[c] + f[c] : f[c]", "t[c] = f[c]"),
    ("elementwise.h", "v += second * load(p.t_value(op.in0) + i) * load(p.grad(op.out) + i)", "v += second * load(p.t_value(op.in0) + i)"),
    ("worker.h", "p.scale_each = c.minus_lr.get() + k * P;", "p.scale_each = c.minus_lr.get();"),
    ("worker.h", "p.grad_scale = c.S == 1 ? -lr(k)[0] : T(-1);", "p.grad_scale = c.S == 1 ? -lr(0)[0] : T(-1);"),
    ("descent.h", "at[j] -= v[j] * m[j];", "at[j] += v[j] * m[j];"),
    ("call.h", "S != 1 || plan.frozen || plan.tied ||", "S != 1 || plan.frozen ||"),
    ("descent.h", "end = j + slot.cols; j < end; ++j)\n          total +=", "end = j + slot.ld; j < end; ++j)\n          total +="),
    ("fixed_input.h", "wide_dot(d + r * ld, d + i * ld, theta.forward.columns)", "wide_dot(d + r * ld, d + i * ld, ld)"),
    ("factored.h", "ld_of(p, Side::x), columns(p, Side::x))", "ld_of(p, Side::x), ld_of(p, Side::x))"),
    ("descent.h", "adapts(i) ? momentum * m[j] +", "adapts(i) ? m[j] +"),
    ("descent.h", "scale * g[j] + weight_decay * w[j]", "scale * g[j] + weight_decay"),
    ("descent.h", "adapts(i) ? momentum * n[j] - a * v[j]", "adapts(i) ? -a * v[j]"),
    ("descent.h", "v[j] += weight_decay * n[j];", ""),
    ("descent.h", "T(norm > 0 ? -scale / ((norm + 1e-6) * norm) : 0)", "T(0)"),
    ("descent.h", "-clipped * n[j]", "-n[j]"),
    ("worker.h", "if (k < K) p.grad_base = p.grad_dst;", ""),
    ("worker.h", "if (weight == 0 && k < K) return;", "if (k < K) return;"),
    ("worker.h", "std::memset(memory.momenta(0, task), 0,", "std::memset(memory.momenta(0, task), 64,"),
    ("worker.h", "query_tail(k, weight * q.scale);", "query_tail(k, q.scale);"),
    ("call.h", "|| !q.step_weights.empty()", ""),
    ("worker.h", "if (slot.uses == 0 || !plan.program.params[i].adapt)\n          std::memcpy", "if (slot.uses == 0)\n          std::memcpy"),
    # the sums of the sets: a node left out, or added twice
    ("partition.h", "begin + size < end; size *= 2", "begin + 2 * size < end; size *= 2"),
    ("inner_loop.h", "if (!by_groups || parts.begins_group(0, j)) add", "if (!by_groups) add"),
    ("inner_loop.h", "if (!by_groups || parts.begins_group(0, j)) add", "add"),
    ("outer_products.h", "const bool first = begin == 0 && !add;", "const bool first = begin == 0;"),
    ("inner_loop.h", "if (!q.per_task) finish(0, round > 0);", "if (!q.per_task) finish(0, false);"),
    ("call.h", "packed.emplace(size * sizeof(T));\n", "packed.emplace(size * sizeof(T));\n    return;\n"),
    # a dropped term of v, or of W
    ("factored.h", "K * (o.tangent_in0 ? 2 : 1)", "K"),
    ("factored.h", "Side::d, !second), rows_of_step(s, j, task, Side::x, second)", "Side::d, !second), rows_of_step(s, j, task, Side::x, false)"),
    ("factored.h", "if (by.of(by.alpha, k, j) != 0)", "if (j + 1 < k)"),
    ("factored.h", "if (has_tangent(by_side))", "if (false)"),
    ("factored.h", "if (has_tangent(side))\n", "if (side == Side::d)\n"),
    ("factored.h", "s.query_steps[i] > k && delta != 0", "false"),
    ("fixed_input.h", "{scaled_q, 1, ld_gram, of_q", "{scaled, 1, ld_gram, of_q"),
    ("fixed_input.h", "e_g[i] -= a * d[i];", "e_g[i] = -a * d[i];"),
    # a wrong number of rows
    ("factored.h", "rows_of_query(s, i, g, by_side), q);", "rows_of_query(s, i, g, by_side), n);"),
    ("factored.h", "rows_of_query(s, kind, task, Side::x), tasks * q}", "rows_of_query(s, kind, task, Side::x), tasks * n}"),
    ("factored.h", "rows_of_step(s, b, g, by_side, true), n);", "rows_of_step(s, b, g, by_side, true), n - 1);"),
    ("fixed_input.h", "x + task * n * ldx, tasks * n};", "x + task * n * ldx, tasks * n - 1};"),
    # a stale Gram matrix
    ("factored.h", "for (int64_t j = 0; j < end; ++j)", "for (int64_t j = 0; j + 1 < end; ++j)"),
    ("fixed_input.h", "nt<T, 1>(q, n, &f_q, query_gram + g * q * ld_gram", "if (g == 0) nt<T, 1>(q, n, &f_q, query_gram + g * q * ld_gram"),
    ("worker.h", "s.grams = s.inner || q.grad_x_s;", "s.grams = s.inner;"),
    ("factored.h", "dot(own_gram(s, Side::d, false, g), t_x)", "dot(own_gram(s, Side::d, false, g), x)"),
    ("packed.h", "from[k * row + (c + j) * step]", "from[k * row + (c + j) * row]"),
    ("packed.h", "(c + j) * step + k0, step", "(c + j) * step, step"),
    ("packed.h", "(16, some - j, from", "(16, lanes<T>, from"),
    ("packed.h", "panel + k0 * width + j", "panel + j"),
    ("packed.h", "if (k > 0) part.add = true;\n      if (end < K)", "if (end < K)"),
    ("packed.h", "if (end < K) part.act = false", "if (false) part.act = false"),
    ("worker.h", "p.grad(b)[i] *= -p.grad_scale;", "p.grad(b)[i] *= p.grad_scale;"),
    # coefficients of momentum, weight decay and clipping, and where they go
    ("coefficients.h", "r = momentum * r + weight_decay * o", "r = weight_decay * o"),
    ("coefficients.h", "momentum * second - weight_decay * first", "momentum * second"),
    ("coefficients.h", "first += rates[k] * second", "first += rates[j] * second"),
    ("coefficients.h", "second = momentum * second - rates[k] * first", "second = -rates[k] * first"),
    ("coefficients.h", "        first += weight_decay * second;\n", ""),
    ("factored.h", "-by.of(by.alpha, k, j) * s.clip(g, j)", "-by.of(by.alpha, k, j)"),
    ("factored.h", "const T c = s.clip(g, k);", "const T c = 1;"),
    ("factored.h", "const T omega = by.omega[s.k];", "const T omega = 1;"),
    ("factored.h", "s.along_g && s.along_g[g] != 0 && adapts(s)", "false"),
    ("factored.h", "end = s.k + (s.own_grams && !Dual && !s.on_query)", "end = s.k"),
    ("factored.h", "double of_m = by.rho[k + 1] * inner[K];", "double of_m = 0;"),
    ("factored.h", "(Dual || (s.on_query && side == Side::d))", "Dual"),
    ("factored.h", "q, by.of(by.gamma, 0, s.query_steps[i]))", "q, T(1))"),
    ("factored.h", "n, by.of(by.gamma, 0, b))", "n, T(1))"),
    ("factored.h", "total -= by.of(by.delta, k, b) * inner[k]", "total += by.of(by.delta, k, b) * inner[k]"),
    ("factored.h", "(moves(side) ? i * s.query_frame : 0)", "0"),
    ("factored.h", "(2 * i + (side == Side::d)) * q", "(side == Side::d) * q"),
    ("linear.h", "(i < r ? 2 : 1) *", "1 *"),
    ("layers.h", "total += layer.square(s, task);", ""),
    ("layers.h", "total += layer.along(s, k, task);", ""),
    ("layers.h", "return c.q.plain && c.q.step_weights.empty();", "return c.q.plain;"),
    ("fixed_input.h", "+ c * d[i] + decay * e_g[i]", "+ c * d[i]"),
    ("fixed_input.h", "y[j] = omega * from[j]", "y[j] = from[j]"),
    ("fixed_input.h", "    both(v_q + (s.offset + g) * q * ld, n_q + g * q * ld, q * ld);\n", ""),
    ("fixed_input.h", "total += by.rho[k + 1] *", "total += 0 *"),
    ("fixed_input.h", "return -dot(scratch", "return dot(scratch"),
    ("fixed_input.h", "scaled_d[i] = more * x_x[i]", "scaled_d[i] = x_x[i]"),
    ("worker.h", "layers.rewind(s, k, task);", ""),
    ("worker.h", "if (descent.clips()) along_g[task] = e;", "if (descent.clips()) along_g[task] = 0;"),
    ("worker.h", "descent.dot(g_t, g_t) + layers.square(s, task)", "descent.dot(g_t, g_t)"),
    ("memory.h", "query_frame + i % query_frames * q_frame", "query_frame"),
    # x where it lies, and sums that go on
    ("memory.h", "if (x_in_place()) return from;", "return from;"),
    ("memory.h", "+ begin * set.n * x.R * x.C;", "+ begin * set.n * x.R;"),
    ("outer_products.h", "sum[r * columns + c] = -from[c];", "sum[r * columns + c] = from[c];"),
    # the places of a step's weights and frames, and what pads the rows
    ("memory.h", "(c.every - 1) + rest - 1) * P", "(c.every - 1)) * P"),
    ("memory.h", "frames > 1 ? k % frames : 0", "0"),
    ("memory.h", "first = buffer.C / lanes<T> * lanes<T>;", "first = ld;"),
]  # fmt: skip

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
    pytest.mark.skipif(not CSRC.exists(), reason="not a source tree"),
]


def build_of(folder: Path, engine: Path, *flags: str) -> Build:
    """Builds the test with that engine, which has the faults; engine: a path, or one within csrc."""
    folder.mkdir()
    sources = TESTS / "test_inner_loop.cpp", CSRC / "cpu" / "arena.cpp"
    sound = [compiled([*COMPILE, *flags], source, CSRC, folder) for source in sources]

    def build(csrc: Path, here: Path) -> Path:
        objects = [compiled(COMPILE, csrc / engine, csrc, here), *sound]
        done = run("g++", "-pthread", *objects, "-o", here / "test")
        assert done.returncode == 0, done.stderr
        return here / "test"

    return build


def test_planted_faults_are_caught(tmp_path: Path, every: int) -> None:
    doubles = build_of(tmp_path / "doubles", TESTS / "engine_of_doubles.cpp", "-DFASTMAML_DOUBLE_ALONE")
    whole = build_of(tmp_path / "whole", Path("cpu/isa_generic.cpp"))
    limit = time_limit(whole(CSRC, tmp_path))
    found = missed(FAULTS[::every], CSRC, "cpu", tmp_path, [doubles, whole], limit)
    assert not found, "\n".join(found)

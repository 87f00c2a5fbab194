"""The CUDA kernels' source on the CPU: against the engine of csrc/cpu, under sanitizers, with planted faults."""

import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faults import compiled, missed, planted, run, time_limit

ROOT = Path(__file__).parents[1]
CSRC, TESTS = ROOT / "csrc", ROOT / "tests" / "cuda"
INNER_LOOP, MMA = TESTS / "test_inner_loop.cpp", TESTS / "test_mma.cpp"
COMPILE = [
    "g++",
    "-std=c++17",
    "-O1",
    "-DFASTMAML_INLINE=inline",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
    "-pthread",
]
CLUSTER = ["-DFASTMAML_CLUSTER=1"]
TSAN = ["-fsanitize=thread", "-g", "-DFASTMAML_EMULATE_THREADS"]
# not optimised: as fast, and compiled in a quarter of the time
ASAN = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O0"]

# file of csrc/cuda, text that is in it once, what it becomes
FAULTS = [
    # a barrier left out
    ("sweep.cuh", "      forward_op<false>(i, op, p);\n    sync_team();", "      forward_op<false>(i, op, p);"),
    ("sweep.cuh", "      backward_op<Dual>(i, op, p);\n    sync_team();", "      backward_op<Dual>(i, op, p);"),
    ("sweep.cuh", "  }\n  sync_team();\n}", "  }\n}"),
    ("task.cuh", "      begin();\n      sync_team();", "      begin();"),
    ("task.cuh", "    sync_team();\n    if (turn != Turn::query || table.v", "    if (turn != Turn::query || table.v"),
    # another task's data
    ("task.cuh", "numbers(set().x) + task * rows * b.C", "numbers(set().x)"),
    ("task.cuh", "numbers(set().weight) + task * n", "numbers(set().weight)"),
    ("task.cuh", "(call.own[i] ? task * q.O * q.I : 0)", "0"),
    ("task.cuh", "static_cast<T*>(rows) + task * table.flat_P", "static_cast<T*>(rows)"),
    ("task.cuh", "numbers(rows) + task * table.flat_P", "numbers(rows)"),
    ("sweep.cuh", "(set.target) + task * set.n * out.R * out.C", "(set.target)"),
    ("sweep.cuh", "(set.target) + task * set.n, share", "(set.target), share"),
    # a term of a tangent dropped
    ("linear.cuh", "t_a[r].at[l] * b.at[l] + a[r].at[l] * t_b.at[l]", "t_a[r].at[l] * b.at[l]"),
    ("linear.cuh", "t_a[r].at[k] * b.at[l] + a[r].at[k] * t_b.at[l]", "t_a[r].at[k] * b.at[l]"),
    ("linear.cuh", "t_a.at[r] * b.at[l] + a.at[r] * t_b.at[l]", "t_a.at[r] * b.at[l]"),
    ("linear.cuh", "if (Dual) t_bias = load_tangent", "if (false) t_bias = load_tangent"),
    ("elementwise.cuh", "v += second * p.t_value(from)[at] * d", "v += second * p.t_value(from)[at]"),
    ("tanh.cuh", "second = -2 * y", "second = 2 * y"),
    ("sigmoid.cuh", "second = 1 - 2 * y", "second = 1 - y"),
    ("silu.cuh", "second = s1 * (2 + x", "second = s1 * (1 + x"),
    ("gelu.cuh", "second = density * (2 - x * x)", "second = density * (1 - x * x)"),
    ("gelu.cuh", "second = t1 + T(0.5) * x * t2", "second = t1 + x * t2"),
    ("leaky_relu.cuh", "first = x > 0 ? T(1) : slope", "first = 1"),
    ("folded.cuh", "if (op.act) t_y = leaky_relu_grad(t_y, y, T(op.slope));", ""),
    ("folded.cuh", "t_g.at[l] = leaky_relu_grad(t_g.at[l], y.at[l], T(op.mask_slope))", "(void)y"),
    ("norm.cuh", "t_v += load_tangent(t_w, c, c) * h_at", "t_v += 0"),
    ("norm.cuh", "- h[at] * t_m;", ";"),
    ("norm.cuh", "t_along += t_h_at(at) * u + h[at] * t_u", "t_along += h[at] * t_u"),
    ("norm.cuh", "-r_group * q", "r_group * q"),
    ("norm.cuh", "column_sums<Dual, 2>", "column_sums<Dual, 1>"),
    ("cross_entropy.cuh", "s * prob * (t_z[c] - along)", "s * prob * t_z[c]"),
    ("cross_entropy.cuh", "prob - off - (c == label", "prob - (c == label"),
    ("mse.cuh", "2 * s * p.t_value(b)[at]", "s * p.t_value(b)[at]"),
    ("add.cuh", "  if (p.wants_grad(op.tangent_in1)) {", "  if (false) {"),
    # what is left in shared memory from before
    ("plan.h", "parameters = data + 2", "parameters = data - 1"),
    ("plan.h", "grad_begin[in] = data;", "grad_begin[in] = std::max(data, back(produced[in]) - 1);"),
    ("plan.h", "until(value_end[from], data);", ""),
    ("task.cuh", "each(table.P, [&](int i) { shared<T>()[table.v + i] = 0; });", ";"),
    ("task.cuh", "shared<T>()[table.products + i] = 0;", ""),
    ("task.cuh", "if (held == k) return;", "if (held >= 0 && k > 0) return;"),
    ("task.cuh", "if (examples == (turn == Turn::query)) return;", "if (examples >= 0) return;"),
    ("elementwise.cuh", "y = c < C ? f.value(x) : T(0)", "y = f.value(x)"),
    ("norm.cuh", "  pad(y, rows, C, width, ld);\n", ""),
    ("linear.cuh", "T y = o < q.O ? sum[r][c] + bias : T(0)", "T y = sum[r][c] + bias"),
    # a bound left out
    ("linear.cuh", "if (o >= width) continue;", ""),
    ("linear.cuh", "const int n = row + r * tall;\n        if (n >= rows) continue;", "const int n = row + r * tall;"),
    ("linear.cuh", "if (n < rows) put_grad_x<Dual>", "put_grad_x<Dual>"),
    ("linear.cuh", "      if (o + r < q.O)\n", ""),
    ("pass.cuh", "to.each_product[flat + j] -= part", "to.each_product[flat] -= part"),
    ("pass.cuh", "v.at[j] *= j < size ? t.rates[flat + j] : T(0)", "v.at[j] *= t.rates[j]"),
    # the recursion
    ("pass.cuh", "g.v = t_w + q.at;", "g.v = table.v + q.at;"),
    ("pass.cuh", "first ? grad_base : grad_dst", "grad_base"),
    ("pass.cuh", "if (!table.param[p].adapt) return T(0);", ""),
    ("task.cuh", "own + k % every - 1", "own + k % every"),
    ("task.cuh", "turn = k == redo_until ? Turn::adjoint", "turn = k + 1 == redo_until ? Turn::adjoint"),
    ("task.cuh", "p.grad_base = back ? table.v : -1", "p.grad_base = -1"),
    ("task.cuh", "numbers(call.step_weights)[k - 1] *", "numbers(call.step_weights)[0] *"),
    ("task.cuh", "numbers(call.lr) + k * call.S", "numbers(call.lr)"),
    ("task.cuh", "p.grad_dst = table.tied ? table.u : table.w;", "p.grad_dst = table.w;"),
    ("task.cuh", "(task * rows + row) * C + c] += v", "(task * rows + row) * C + c] = v"),
    # tasks one after another, and the sums over them
    ("task.cuh", "    sync_team();\n  }\n  if (sums.count == 0)", "  }\n  if (sums.count == 0)"),
    ("task.cuh", "task += teams()", "task += teams() + 1"),
    ("task.cuh", "  sync_grid();\n", ""),
    ("task.cuh", "i += int64_t(gridDim.x) * blockDim.x", "i += blockDim.x * int64_t(gridDim.x + 1)"),
    ("task.cuh", "sum += static_cast<const T*>(of.rows)", "sum = static_cast<const T*>(of.rows)"),
]  # fmt: skip
RACE = FAULTS[1]
# the same by a cluster
CLUSTER_FAULTS = [
    *FAULTS[:5],  # a barrier left out
    *FAULTS[-5:],
    ("team.cuh", "0xffffffffu / vectors + 1", "0xffffffffu / vectors"),
    ("team.cuh", "unsigned(at) / lanes<T>", "unsigned(at) / (lanes<T> + 1)"),
    ("team.cuh", "(at - int(block * vectors) * lanes<T>)", "at % int(vectors)"),
    ("team.cuh", "int(cluster_rank() * blockDim.x + threadIdx.x)", "int(threadIdx.x)"),
    ("team.cuh", "int(cluster_blocks() * blockDim.x)", "int(blockDim.x)"),
    ("team.cuh", "int(blockIdx.x / cluster_blocks())", "int(blockIdx.x)"),
    ("team.cuh", "int(gridDim.x / cluster_blocks())", "int(gridDim.x)"),
    ("team.cuh", "warp() { return thread() / 32; }", "warp() { return int(threadIdx.x) / 32; }"),
    ("plan.h", "t_.params * t_.blocks * (t_.threads / 32)", "t_.params * (t_.threads / 32)"),
]  # fmt: skip
# the same for the products on tensor cores, which test_mma.cpp finds
MMA_FAULTS = [
    *FAULTS[:3],  # a barrier left out
    # another lane's numbers, or another register's
    ("mma.cuh", "i + lane() / 4 + 8 * lower", "i + lane() % 8 + 8 * lower"),
    ("mma.cuh", "i + lane() / 4 + 8 * lower", "i + lane() / 4 + 4 * lower"),
    ("mma.cuh", "(lane() % 4 + 4 * further)", "(lane() / 8 + 4 * further)"),
    ("mma.cuh", "(lane() % 4 + 4 * further)", "(lane() % 4 + 2 * further)"),
    ("mma.cuh", "n == 4 ? r % 2 : 0", "n == 4 ? r / 2 : 0"),
    ("mma.cuh", "n == 4 ? r / 2 : r;", "n == 4 ? r % 2 : r;"),
    ("mma.cuh", "to_bf16(of(i, k), of(i, k + 1))", "to_bf16(of(i, k), of(i + 1, k))"),
    ("mma.cuh", "return lane() / 4;", "return lane() % 8;"),
    ("mma.cuh", "return 2 * (lane() % 4);", "return lane() % 4;"),
    # a part of the product dropped, or one too many
    ("mma.cuh", "multiply_add<P>(t_sum, tangent, part_b)", "(void)tangent"),
    ("mma.cuh", "multiply_add<P>(t_sum, part_a, tangent)", "(void)tangent"),
    ("mma.cuh", "tile_depth = 8 * in_register<P>", "tile_depth = 16"),
    ("mma.cuh", "Dual && moves_a", "Dual"),
    ("mma.cuh", "tile % wide * tile_columns", "tile % wide * 2 * tile_columns"),
    ("linear_mma.cuh", "bias = p.param(op.b)[o];", "bias = p.param(op.b)[column];"),
    ("linear_mma.cuh", "t_bias = load_tangent", "(void)load_tangent"),
    # a mask left out
    ("linear_mma.cuh", "n < rows && i < q.I ? x[", "n < rows ? x["),
    ("linear_mma.cuh", "n < rows && i < q.I ? t_x[", "n < rows ? t_x["),
    ("linear_mma.cuh", "n < rows && o < q.O ? d[", "n < rows ? d["),
    ("linear_mma.cuh", "n < rows && o < q.O ? t_d[", "n < rows ? t_d["),
    ("linear_mma.cuh", "i < q.I && o < q.O ? w[", "i < q.I ? w["),
    ("linear_mma.cuh", "o < q.O && n < rows ? d[", "o < q.O ? d["),
    ("linear_mma.cuh", "o < q.O && n < rows ? t_d[", "o < q.O ? t_d["),
    ("linear_mma.cuh", "i < q.I && n < rows ? x[", "i < q.I ? x["),
    ("linear_mma.cuh", "if (o >= width) continue;", ""),
    ("linear_mma.cuh", "if (n < rows) put_y", "put_y"),
    ("linear_mma.cuh", "if (n < rows && i < width) put_grad_x", "if (n < rows) put_grad_x"),
    ("linear_mma.cuh", "if (n < rows && i < width) put_grad_x", "if (i < width) put_grad_x"),
    ("linear_mma.cuh", "if (o < q.O && i < width)", "if (o < q.O)"),
    ("linear_mma.cuh", "if (o < q.O && i < width)", "if (i < width)"),
    # the end of a parameter's gradient
    ("linear_mma.cuh", "o * q.ld + i, o * q.I + i, q.I - i, g[r]", "o * q.ld + i, o * q.ld + i, q.I - i, g[r]"),
    ("linear_mma.cuh", "  finish_products(p, op.w, product);\n", ""),
]  # fmt: skip

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
    pytest.mark.skipif(not CSRC.exists(), reason="not a source tree"),
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The engine of csrc/cpu, to compare with."""
    folder = tmp_path_factory.mktemp("engine")
    sources = TESTS.parent / "cpp" / "engine_of_doubles.cpp", CSRC / "cpu" / "arena.cpp"
    return [compiled(COMPILE, source, CSRC, folder) for source in sources]


def build(engine: list[Path], test: Path, folder: Path, csrc: Path = CSRC, flags: Sequence[str] = ()) -> Path:
    folder.mkdir(exist_ok=True)
    made = compiled([*COMPILE, *flags], test, csrc, folder)
    done = run("g++", "-pthread", *flags, made, *engine, "-o", folder / "test")
    assert done.returncode == 0, done.stderr
    return folder / "test"


EACH_TEST = pytest.mark.parametrize("test", [INNER_LOOP, MMA], ids=lambda test: test.stem)
EACH_TEAM = pytest.mark.parametrize("team", [[], CLUSTER], ids=["one_block", "cluster"])


def only_with_all(every: int, rare: bool) -> None:
    if every > 1 and rare:
        pytest.skip("the same code by more blocks: --all runs it")


@EACH_TEAM
@EACH_TEST
def test_against_the_cpu_engine_in_every_order_of_the_threads(
    engine: list[Path], tmp_path: Path, every: int, test: Path, team: list[str]
) -> None:
    only_with_all(every, bool(team) and test == MMA)
    strict = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    runs = build(engine, test, tmp_path, flags=[*strict, *team])
    for threads in (32,) if team else (32, 64, 256):
        done = run(runs, threads)
        assert done.returncode == 0, done.stdout + done.stderr


@EACH_TEAM
@EACH_TEST
def test_bounds_alignment_and_undefined_behaviour(
    engine: list[Path], tmp_path: Path, every: int, test: Path, team: list[str]
) -> None:
    only_with_all(every, bool(team) and test == MMA)
    done = run(build(engine, test, tmp_path, flags=[*ASAN, *team]), 32 if team else 64, 7 if team else 4)
    assert done.returncode == 0, done.stdout + done.stderr


@EACH_TEAM
@EACH_TEST
def test_races(engine: list[Path], tmp_path: Path, every: int, test: Path, team: list[str]) -> None:
    """ThreadSanitizer, which sees a race in most runs, not in each: so there are several, and one is planted."""
    only_with_all(every, bool(team))
    threads = 32 if team else 64
    sources = {"sound": CSRC, "racy": planted(RACE, CSRC, tmp_path / "race" / "csrc", "cuda")}
    built = lambda name: build(engine, test, tmp_path / name, sources[name], [*TSAN, *team])  # noqa: E731
    with ThreadPoolExecutor(os.cpu_count() or 2) as pool:
        sound, racy = pool.map(built, sources)
    done = [run(sound, threads, 9) for _ in range(4)]
    assert all(d.returncode == 0 for d in done), "\n".join(d.stdout + d.stderr for d in done)
    runs = (run(racy, threads, 6) for _ in range(5))
    assert any("data race" in d.stderr for d in runs)


@pytest.mark.parametrize(
    ("test", "faults", "team"),
    [(INNER_LOOP, FAULTS, []), (MMA, MMA_FAULTS, []), (INNER_LOOP, CLUSTER_FAULTS, CLUSTER)],
    ids=["loop", "mma", "cluster"],
)
def test_planted_faults_are_caught(
    engine: list[Path], tmp_path: Path, every: int, test: Path, faults: list[tuple[str, str, str]],
    team: list[str],
) -> None:  # fmt: skip
    threads = 32 if team else 64
    limit = time_limit(build(engine, test, tmp_path, flags=team), threads)
    with_fault = lambda csrc, folder: build(engine, test, folder, csrc, team)  # noqa: E731
    found = missed(faults[::every], CSRC, "cuda", tmp_path, [with_fault], limit, threads)
    assert not found, "\n".join(found)

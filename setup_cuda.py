"""How setup.py finds the compilers, and compiles csrc/cuda with nvcc.

Run by itself it does the latter, which takes minutes, and no torch.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent
SOURCES = sorted(str(p.relative_to(ROOT)) for p in [ROOT / "csrc/program.h", *ROOT.glob("csrc/cuda/*.*")])
KERNELS = ["build/cuda/inner_loop.o", "build/cuda/cluster.o"]  # each of the source of that name
COMMAND = "build/cuda/command"  # that makes them; newer than what another one made
OLDEST_NVCC = 12, 1  # before, a kernel's parameters had at most 4 KiB: those of csrc/cuda/table.h have 13
OLDEST_GPU, FIRST_CLUSTERS = 80, 90  # as FASTMAML_HAS_TEAM in csrc/cuda/device.h


def why_no_cpp() -> str | None:
    """The reason to install pure Python, or None when the extension is to be built."""
    if os.environ.get("FASTMAML_CPP", "1") == "0":
        return "FASTMAML_CPP=0"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler):
        return None
    if "CXX" not in os.environ and shutil.which("g++"):
        os.environ["CXX"] = "g++"
        return None
    return f"no C++ compiler ({compiler}) found"


def wanted() -> str | None:
    return os.environ.get("FASTMAML_CUDA")


def find_nvcc() -> str | None:
    """nvcc, where CUDA kernels are to be built and one is found that can."""
    if wanted() == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    first, last = (home and shutil.which("nvcc", path=os.path.join(home, "bin")) for home in homes)
    nvcc = first or shutil.which("nvcc") or last
    why = "there is no nvcc: set CUDA_HOME" if nvcc is None else why_too_old(nvcc)
    if why is None:
        return nvcc
    if wanted() == "1":
        raise SystemExit(f"FASTMAML_CUDA=1, but {why}")
    if nvcc is not None:
        print(f"fastmaml: {why}: building without CUDA kernels", file=sys.stderr)
    return None


def version(nvcc: str) -> str:
    return subprocess.check_output([nvcc, "--version"], text=True)


def why_too_old(nvcc: str) -> str | None:
    found = re.search(r"release (\d+)\.(\d+)", version(nvcc))
    if found and (int(found[1]), int(found[2])) >= OLDEST_NVCC:
        return None
    what = f"is of CUDA {found[1]}.{found[2]}" if found else "does not say of which CUDA it is"
    return f"{nvcc} {what}, and the kernels take 12.1 or newer (and a driver of 530 or newer)"


def architectures(nvcc: str) -> list[str]:
    """The -gencode arguments: code for each of TORCH_CUDA_ARCH_LIST that the kernels run on, and PTX where
    +PTX follows; that of one which is left out comes from the newest that is kept."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    names = (listed or "8.0 9.0 10.0 12.0+PTX").replace(";", " ").replace(".", "").split()
    ptx = {name.removesuffix("+PTX"): name.endswith("+PTX") for name in names}
    known = subprocess.check_output([nvcc, "--list-gpu-code"], text=True).split()
    number = lambda arch: int(re.sub(r"\D", "", arch) or 0)  # noqa: E731
    # of those asked for by name, nvcc says itself that it does not know them
    kept = [a for a in ptx if number(a) >= OLDEST_GPU and (listed or f"sm_{a}" in known)]
    if not kept:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST={listed}: the kernels need compute capability 8.0 or newer")
    if any(ptx[a] for a in ptx if a not in kept):
        ptx[max(kept, key=number)] = True
    # Half of the time goes into PTX. That of an architecture serves every newer one; but before clusters
    # there is less in it, and that of one with a letter (90a) serves it alone.
    groups: dict[object, list[str]] = {}
    for arch in sorted(kept, key=number):
        groups.setdefault(number(arch) >= FIRST_CLUSTERS if arch.isdecimal() else arch, []).append(arch)
    arguments = []
    for group in groups.values():
        codes = [f"sm_{arch}" for arch in group] + [f"compute_{group[0]}"] * any(ptx[a] for a in group)
        arguments += ["-gencode", f"arch=compute_{group[0]},code=[{','.join(codes)}]"]
    return arguments


def runtime(nvcc: str) -> str:
    """The folder of CUDA's static runtime: by nvcc, which may be a link, or a script that calls another."""
    homes = [Path(os.path.realpath(nvcc)).parents[1], Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
    folders = [home / lib for home in homes for lib in ("lib64", "lib", "targets/x86_64-linux/lib")]
    found = next((str(f) for f in folders if (f / "libcudart_static.a").exists()), None)
    if found is None:
        raise SystemExit(f"no libcudart_static.a near {nvcc}: set CUDA_HOME, or FASTMAML_CUDA=0")
    return found


def note(text: str, root: Path = ROOT) -> None:
    """Writes it down where it is new: what was made by another command is older then."""
    file = root / COMMAND
    if not file.exists() or file.read_text() != text:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def compile_kernels(nvcc: str, sources: list[str], root: Path = ROOT) -> None:
    """csrc/cuda for the GPU, unless that is done; what ptxas says of registers and spills goes beside it."""
    host = ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    command = [
        nvcc,
        "-std=c++17",
        "-O3",
        "--threads",
        "0",
        "-Xptxas",
        "-v",
        *host,
        *architectures(nvcc),
        "-c",
    ]
    note(f"{' '.join(command)}\n{version(nvcc)}", root)
    newest = max((root / name).stat().st_mtime for name in [*sources, COMMAND])

    def compile_one(target: Path) -> str | None:
        if target.exists() and target.stat().st_mtime > newest:
            return None
        source = f"csrc/cuda/{target.stem}.cu"
        print(f"fastmaml: compiling {source}", file=sys.stderr)
        this = [*command, source, "-o", str(target)]
        done = subprocess.run(this, cwd=root, stderr=subprocess.PIPE, text=True, check=False)
        target.with_suffix(".ptxas").write_text(done.stderr)
        return f"{' '.join(this)}\n{done.stderr}" if done.returncode else None

    with ThreadPoolExecutor() as pool:
        failed = [why for why in pool.map(compile_one, map(root.joinpath, KERNELS)) if why]
    if failed:
        raise SystemExit("\n".join([*failed, "FASTMAML_CUDA=0 builds without CUDA kernels"]))


if __name__ == "__main__":
    if why_no_cpp() is None and (found := find_nvcc()):
        compile_kernels(found, SOURCES)

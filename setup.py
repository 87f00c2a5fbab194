"""The build: pure Python plus one C++ extension, `fastmaml._C`.

The extension uses torch's stable ABI alone, so one abi3 wheel serves every torch >= 2.10. Without a C++
compiler, or with FASTMAML_CPP=0, only the Python is installed; `fastmaml` then uses its `torch` backend.

Where nvcc is found (CUDA_HOME, PATH, /usr/local/cuda) the extension holds CUDA kernels too, with CUDA's own
runtime linked in: neither building nor importing it takes a CUDA build of torch. FASTMAML_CUDA=0 leaves them
out, =1 fails without them; TORCH_CUDA_ARCH_LIST names the architectures.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
DEFINES = [
    ("TORCH_TARGET_VERSION", "0x020a000000000000"),  # the oldest torch whose stable ABI is used: 2.10
    ("TORCH_STABLE_ONLY", None),
]


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


def find_nvcc() -> str | None:
    """nvcc, where CUDA kernels are to be built and it can be found."""
    wanted = os.environ.get("FASTMAML_CUDA")
    if wanted == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    first, last = (home and shutil.which("nvcc", path=os.path.join(home, "bin")) for home in homes)
    nvcc = first or shutil.which("nvcc") or last
    if nvcc is None and wanted == "1":
        raise SystemExit("FASTMAML_CUDA=1, but there is no nvcc: set CUDA_HOME")
    return nvcc


def architectures(nvcc: str) -> list[str]:
    """The -gencode arguments: code for each of TORCH_CUDA_ARCH_LIST, and PTX where +PTX follows."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    names = (listed or "8.0 9.0 10.0 12.0+PTX").replace(";", " ").replace(".", "").split()
    if not listed:  # as far as this nvcc knows them
        known = subprocess.check_output([nvcc, "--list-gpu-code"], text=True).split()
        names = [name for name in names if f"sm_{name.removesuffix('+PTX')}" in known]
    arguments = []
    for name in names:
        arch = name.removesuffix("+PTX")
        code = f"[sm_{arch},compute_{arch}]" if name.endswith("+PTX") else f"sm_{arch}"
        arguments += ["-gencode", f"arch=compute_{arch},code={code}"]
    return arguments


def runtime(nvcc: str) -> str:
    """The folder of CUDA's static runtime: by nvcc, which may be a link, or a script that calls another."""
    homes = [Path(os.path.realpath(nvcc)).parents[1], Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
    folders = [home / lib for home in homes for lib in ("lib64", "lib", "targets/x86_64-linux/lib")]
    found = next((str(f) for f in folders if (f / "libcudart_static.a").exists()), None)
    if found is None:
        raise SystemExit(f"no libcudart_static.a near {nvcc}: set CUDA_HOME, or FASTMAML_CUDA=0")
    return found


KERNELS = "build/cuda/inner_loop.o"


def compile_kernels(nvcc: str) -> None:
    """csrc/cuda for the GPU, unless that is done; what ptxas says of registers and spills goes beside it."""
    target = ROOT / KERNELS
    sources = [ROOT / p for p in ["setup.py", "csrc/program.h", *paths("cuda/*")]]
    if target.exists() and target.stat().st_mtime > max(p.stat().st_mtime for p in sources if p.is_file()):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    print("fastmaml: compiling the CUDA kernels", file=sys.stderr)
    host = ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    command = [nvcc, "-std=c++17", "-O3", "--threads", "0", "-Xptxas", "-v", *host, *architectures(nvcc)]
    command += ["-c", "csrc/cuda/inner_loop.cu", "-o", KERNELS]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    target.with_suffix(".ptxas").write_text(done.stderr)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}\nFASTMAML_CUDA=0 builds without CUDA kernels")


def paths(pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob(pattern))


def extension() -> dict:
    """The arguments of setup() that build `fastmaml._C`; needs torch."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    # The ISA variants select their target by pragma in the source, so every file takes the same flags.
    # Python's own flags come first and hold -g and -fwrapv, which are undone here.
    # py_limited_api makes torch define Py_LIMITED_API.
    module = CppExtension(
        "fastmaml._C",
        paths("*.cpp") + paths("cpu/*.cpp"),
        include_dirs=[str(ROOT / "csrc")],
        depends=[*paths("**/*.h"), *paths("cuda/*.cu*"), "setup.py"],
        define_macros=DEFINES,
        extra_compile_args=["-O3", "-g0", "-fno-wrapv", "-std=c++17", "-fvisibility=hidden", "-pthread"],
        extra_link_args=["-pthread"],
        py_limited_api=True,
    )

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            if nvcc := find_nvcc():
                compile_kernels(nvcc)
                module.extra_objects.append(KERNELS)
                module.library_dirs.append(runtime(nvcc))
                module.libraries += ["cudart_static", "rt", "dl", "pthread"]
                # its calls must not end in another runtime that the process has
                module.extra_link_args.append("-Wl,--exclude-libs,libcudart_static.a")
            super().build_extensions()

    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


reason = why_no_cpp()
if reason:
    print(f"fastmaml: {reason}: installing without the C++ backend", file=sys.stderr)
setup(**({} if reason else extension()))

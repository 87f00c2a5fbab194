"""The build: pure Python plus one C++ extension, `fastmaml._C`.

The extension uses torch's stable ABI alone, so one abi3 wheel serves every torch >= 2.10. Without a C++
compiler, or with FASTMAML_CPP=0, only the Python is installed; `fastmaml` then uses its `torch` backend.

Where nvcc is found (CUDA_HOME, PATH, /usr/local/cuda) the extension holds CUDA kernels too, with CUDA's own
runtime linked in: neither building nor importing it takes a CUDA build of torch. FASTMAML_CUDA=0 leaves them
out, =1 fails without them; TORCH_CUDA_ARCH_LIST names the architectures. See setup_cuda.py.
"""

import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))
import setup_cuda  # noqa: E402

DEFINES = [
    ("TORCH_TARGET_VERSION", "0x020a000000000000"),  # the oldest torch whose stable ABI is used: 2.10
    ("TORCH_STABLE_ONLY", None),
]


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
        depends=[*paths("**/*.h"), *setup_cuda.SOURCES, "setup.py", "setup_cuda.py"],
        define_macros=DEFINES,
        extra_compile_args=["-O3", "-g0", "-fno-wrapv", "-std=c++17", "-fvisibility=hidden", "-pthread"],
        extra_link_args=["-pthread"],
        py_limited_api=True,
    )

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            nvcc = setup_cuda.find_nvcc()
            if nvcc is None:
                setup_cuda.note("none")  # in what was linked before there may be kernels
            else:
                setup_cuda.compile_kernels(nvcc, setup_cuda.SOURCES)
                module.extra_objects += setup_cuda.KERNELS
                module.library_dirs.append(setup_cuda.runtime(nvcc))
                module.libraries += ["cudart_static", "rt", "dl", "pthread"]
                # its calls must not end in another runtime that the process has
                module.extra_link_args.append("-Wl,--exclude-libs,libcudart_static.a")
            module.depends.append(setup_cuda.COMMAND)
            super().build_extensions()

    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


reason = setup_cuda.why_no_cpp()
if reason:
    print(f"fastmaml: {reason}: installing without the C++ backend", file=sys.stderr)
setup(**({} if reason else extension()))

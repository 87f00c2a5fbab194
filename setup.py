"""The build: pure Python plus one C++ extension, `fastmaml._C`.

The extension uses torch's stable ABI alone, so one abi3 wheel serves every torch >= 2.10. Without a C++
compiler, or with FASTMAML_CPP=0, only the Python is installed; `fastmaml` then uses its `torch` backend.
"""

import os
import shutil
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
        depends=[*paths("**/*.h"), "setup.py"],
        define_macros=DEFINES,
        extra_compile_args=["-O3", "-g0", "-fno-wrapv", "-std=c++17", "-fvisibility=hidden", "-pthread"],
        extra_link_args=["-pthread"],
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


reason = why_no_cpp()
if reason:
    print(f"fastmaml: {reason}: installing without the C++ backend", file=sys.stderr)
setup(**({} if reason else extension()))

"""Builds the native kernels; everything else about the package stands in pyproject.toml."""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("pag_retrofit/kernels/src")
FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", "-g0",
    # Sums may be reordered by hand only; these allow fused multiply-adds and vector minima.
    "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=fast",
]  # fmt: skip
# Vectors are written by hand; the compiler's, of loops over a few pixels, cost more than they save.
BY_HAND = ["-fno-tree-vectorize", "-fno-tree-slp-vectorize"]
INSTRUCTION_SETS = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = ["-mavx2", "-mfma", "-mavx512f", "-mavx512dq", "-mavx512vl"]
    if platform.system() == "Linux":  # which hands out the state that it needs
        amx = ["-mavx512bw", "-mavx512vbmi", "-mamx-tile", "-mamx-int8"]
        INSTRUCTION_SETS["amx"] = INSTRUCTION_SETS["avx512"] + amx
OPTIONAL = "amx"  # compilers know it since g++ 11 and clang++ 12


class BuildKernels(build_ext):
    """Compiles one source once per instruction set, and links all copies into one library.

    The result is loaded with ctypes: it holds no Python and no torch, so it fits any version.
    """

    def build_extension(self, extension: Extension) -> None:
        """Compile and link, with the flags of PAG_RETROFIT_CXXFLAGS (for sanitizers) at the end."""
        extra = os.environ.get("PAG_RETROFIT_CXXFLAGS", "").split()
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compiler is a process: threads wait
            running = {
                name: pool.submit(
                    self._compile,
                    "instruction_set.cpp",
                    name,
                    [*BY_HAND, *flags, f"-DPAG_INSTRUCTION_SET={name}", *extra],
                )
                for name, flags in reversed(INSTRUCTION_SETS.items())  # the longest first
            }
        objects, defines = [], []
        # Portable first: of functions that several objects hold, the linker takes the first.
        for name in INSTRUCTION_SETS:
            try:
                objects += running[name].result()
            except CompileError:
                if name != OPTIONAL:
                    raise
                print(f"built without {name}: the compiler does not know it")
            else:
                defines += ["-DPAG_WITH_AMX"] if name == OPTIONAL else []
        objects += self._compile("interface.cpp", "interface", [*defines, *extra])
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(extension.name),
            extra_postargs=["-pthread", *extra],
            target_lang="c++",
        )

    def _compile(self, source: str, folder: str, flags: list[str]) -> list[str]:
        # One folder a copy: the objects of one source would overwrite each other.
        return self.compiler.compile(
            [str(SOURCES / source)],
            output_dir=str(Path(self.build_temp) / folder),
            extra_postargs=[*FLAGS, *flags],
        )


setup(
    ext_modules=[
        # Optional: without a compiler the package installs, and runs on plain torch.
        Extension(
            "pag_retrofit.kernels._kernels",
            [str(SOURCES / "interface.cpp"), str(SOURCES / "instruction_set.cpp")],
            depends=[str(path) for path in sorted(SOURCES.glob("*.h"))],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)

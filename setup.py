"""Builds the Cython core; everything else about the package stands in pyproject.toml.

Two switches, both off in a release build:

ASYNCXFER_BUILD_LINETRACE=1   a debug build whose Cython lines can be traced and covered (slow)
ASYNCXFER_BUILD_ANNOTATE=1    annotated HTML of each source under build/cython/
"""

from __future__ import annotations

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
FAST = Path("asyncxfer/_fast")
LINETRACE = os.environ.get("ASYNCXFER_BUILD_LINETRACE") == "1"
ANNOTATE = os.environ.get("ASYNCXFER_BUILD_ANNOTATE") == "1"


def extension(source: Path) -> Extension:
    """Describe one extension module: the same flags for all, so that they inline and link alike."""
    optimise = ["-O1", "-g"] if LINETRACE else ["-O3", "-g0"]
    macros: list[tuple[str, str | None]] = [("_GNU_SOURCE", "1")]
    if LINETRACE:
        macros.append(("CYTHON_TRACE_NOGIL", "1"))
    return Extension(
        ".".join((*FAST.parts, source.stem)),
        [source.as_posix()],
        include_dirs=[FAST.as_posix()],
        depends=sorted(path.as_posix() for pattern in ("*.h", "*.pxd") for path in FAST.glob(pattern)),
        define_macros=macros,
        extra_compile_args=["-std=gnu11", *optimise, "-fvisibility=hidden", "-pthread", "-Wall", "-Wno-sign-compare"],
        extra_link_args=["-pthread"],
    )


class BuildExt(build_ext):
    """Compiles for an editable install where `build_ext --inplace` does, which then finds it and compiles nothing."""

    def finalize_options(self) -> None:
        if self.editable_mode:  # setuptools would throw away what it compiles once it has been copied into place
            usual = build(self.distribution)
            usual.ensure_finalized()
            self.build_lib = usual.build_platlib
        super().finalize_options()


os.chdir(HERE)
setup(
    cmdclass={"build_ext": BuildExt},
    ext_modules=cythonize(
        [extension(source) for source in sorted(FAST.glob("*.pyx"))],
        build_dir="build/cython",  # generated C stays out of the source tree and out of the wheel
        annotate=ANNOTATE,
        nthreads=os.cpu_count() or 1,
        compiler_directives={"language_level": "3", "linetrace": LINETRACE, "profile": LINETRACE},
    ),
    options={"build_ext": {"parallel": os.cpu_count()}},
)

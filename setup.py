"""Extension modules and their build flavours; everything else is in pyproject.toml.

Every propolis/**/_*.pyx is a module. PROPOLIS_BUILD picks the flavour, PROPOLIS_WERROR=1 turns warnings of Cython and
of the C compiler into errors (for the lint build: a user's compiler may know warnings that ours does not).
"""

import os
import sys
from glob import glob

from Cython.Build import cythonize
from Cython.Compiler import Options
from setuptools import Extension, find_packages, setup

TRACE = [("CYTHON_TRACE", "1"), ("CYTHON_TRACE_NOGIL", "1"), ("CYTHON_USE_SYS_MONITORING", "0")]
FLAVOURS = {  # name: (C flags, linker flags, macros); all but release keep Cython's checks on
    "release": (["-O2", "-g1"], [], []),
    "debug": (["-O1", "-g", "-UNDEBUG"], [], [("PROPOLIS_DEBUG", "1")]),
    "trace": (["-O0", "-g"], [], TRACE),
    "asan": (["-O1", "-g", "-UNDEBUG", "-fsanitize=address,undefined"], ["-fsanitize=address,undefined"], []),
    "tsan": (["-O1", "-g", "-UNDEBUG", "-fsanitize=thread"], ["-fsanitize=thread"], []),
}
ONLY_ON = {"_kvm": "linux", "_uring": "linux", "_bhyve": "sunos"}
WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Wno-sign-conversion", "-Wno-unused-parameter"]

flavour = os.environ.get("PROPOLIS_BUILD") or "release"
sources = sorted(glob("propolis/**/_*.pyx", recursive=True))
if flavour == "none":  # scripts/setup installs editable this way and then builds the modules in place, once
    flavour, sources = "release", []
if flavour not in FLAVOURS:
    sys.exit(f"PROPOLIS_BUILD={flavour}: expected one of {', '.join(FLAVOURS)}")
strict = os.environ.get("PROPOLIS_WERROR") == "1"
checked = flavour != "release"
jobs = min(os.cpu_count() or 1, int(os.environ.get("PROPOLIS_JOBS", "4")))
c_flags, link_flags, macros = FLAVOURS[flavour]


def extension(source: str) -> Extension:
    return Extension(
        source.removesuffix(".pyx").replace("/", "."),
        [source],
        include_dirs=["."],
        define_macros=macros,
        extra_compile_args=[*c_flags, "-ffunction-sections", *WARNINGS, *(["-Werror"] if strict else [])],
        extra_link_args=link_flags,
        # Cython follows .pxd files; the C compiler's inputs and these flags it does not.
        depends=["setup.py", *sorted(glob("propolis/**/*.h", recursive=True))],
    )


def wanted(source: str) -> bool:
    return sys.platform.startswith(ONLY_ON.get(os.path.basename(source).removesuffix(".pyx"), ""))


if __name__ == "__main__":
    Options.warning_errors = strict
    base = f"build/{flavour}{'-werror' if strict else ''}"
    setup(
        packages=[*find_packages(include=["propolis", "propolis.*"]), "propolis_cli"],
        package_dir={"propolis_cli": "cli"},
        options={"build": {"build_base": base}, "build_ext": {"parallel": jobs}},
        ext_modules=cythonize(
            [extension(source) for source in sources if wanted(source)],
            build_dir="build/cython-werror" if strict else f"build/cython-{flavour}",
            nthreads=jobs,
            annotate=True,
            emit_linenums=checked,
            compiler_directives={
                "language_level": 3,
                "binding": True,
                "embedsignature": True,
                "auto_pickle": False,
                "cdivision": True,
                "boundscheck": checked,
                "wraparound": checked,
                "initializedcheck": checked,
                "linetrace": flavour == "trace",
                "warn.maybe_uninitialized": True,
                "warn.unused": True,
            },
        ),
    )

"""What pyproject.toml cannot say: the packages' folders, the kernels' library, and the wheel's tag.

The library of CPU kernels has no Python in it, so that one wheel serves every Python 3: `py3-none-linux_x86_64`,
`py3-none-linux_aarch64`, or `py3-none-any` where there is none. STARLING_BUILD_KERNELS=0 leaves it out, =1 makes a
failing compiler an error; otherwise the package installs without it where it cannot be compiled.
"""

import os
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

ROOMS = ("cli", "engine", "export", "profiling", "serving")
#: Folders of engine/kernels with sources that a compiler of the CPU takes.
KERNEL_FOLDERS = ("attention", "operators", "product", "simd")
#: By platform how the names of its own sources end; all others are every processor's.
SOURCES_OF = {
    "linux-x86_64": ("_x86.cpp", "_avx2.cpp", "_avx_vnni.cpp", "_avx512.cpp", "_bf16.cpp", "_amx.cpp"),
    "linux-aarch64": ("_arm.cpp", "_neon.cpp", "_neon_i8mm.cpp"),
}
#: What is built for: `_PYTHON_HOST_PLATFORM`, CPython's own word for it, where a compiler is another processor's.
PLATFORM = sysconfig.get_platform()
KERNELS = os.environ.get("STARLING_BUILD_KERNELS", "")
COMPILED = KERNELS != "0" and PLATFORM in SOURCES_OF


def kernel_sources() -> list[str]:
    """The sources of the platform's processor, and those of every one."""
    others = tuple(name for of, names in SOURCES_OF.items() if of != PLATFORM for name in names)
    sources = (source for folder in KERNEL_FOLDERS for source in glob(f"engine/kernels/{folder}/*.cpp"))
    return sorted(source for source in sources if not source.endswith(others))


library = Extension(
    "starling.engine.kernels._library",
    kernel_sources(),
    depends=sorted(glob("engine/kernels/*/*.h")),
    include_dirs=["engine/kernels"],
    extra_compile_args=[
        *("-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"),
        *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # GCC finds these in its own header of AVX-512
    ],
    extra_link_args=["-s"],
    language="c++",
    optional=KERNELS != "1",
)


class BuildLibrary(build_ext):
    """Names the library without a Python version."""

    def get_ext_filename(self, fullname: str) -> str:
        """`starling/engine/kernels/_library.so`."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        """The platform is the compiled library's."""
        return "py3", "none", super().get_tag()[2]


class EditableCheckout(editable_wheel):
    """Puts the checkout itself on the path, where its folder `starling` is what type checkers find as well."""

    def finalize_options(self) -> None:
        """Links are needed for that; a file system without them gets setuptools' import hook."""
        if all(Path("starling", room).is_dir() for room in ROOMS):
            self.distribution.package_dir = {"": "."}
        super().finalize_options()


setup(
    packages=["starling", *(f"starling.{name}" for name in find_packages(include=[f"{room}*" for room in ROOMS]))],
    # Not through the links of `starling`, so that a wheel is whole where a checkout has none.
    package_dir={f"starling.{room}": room for room in ROOMS},
    ext_modules=[library] if COMPILED else [],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPythonWheel, "editable_wheel": EditableCheckout},
)

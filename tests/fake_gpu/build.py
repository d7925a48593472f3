"""Build the fake CUDA libraries for the CUDA build of torch that is installed. See README.md."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "runtime"
LIBRARIES = {  # what stands in for each of CUDA's libraries
    "libcudart.so.13": ("devices.c", "memory.c", "streams.c"),
    "libcublas.so.13": ("cublas.c",),
    "libcublasLt.so.13": ("cublasLt.c",),
    "libcuda.so.1": ("driver.c",),
}
# torch calls these to configure cuBLAS, and they need no more than the answer "success".
CONFIGURES = re.compile(r"cublas(Lt)?\w*(Set|Create|Destroy|Init|Get)\w*$")
MULTIPLIES = re.compile(r"cublas\w*(gemm|gemv|dot)\w*$", re.IGNORECASE)


class BuildError(Exception):
    """The fake libraries cannot be built here; the message names what is missing."""


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise BuildError(
            f"the package {name} is not installed; expected a CUDA build of torch: pip install torch==2.14.1"
        )
    return Path(spec.origin).parent


def _imported(library: str, folder: Path) -> set[str]:
    """Return the functions that the libraries of torch import from one of CUDA's libraries."""
    names = set()
    for file in sorted(folder.glob("*.so")):
        table = subprocess.run(["nm", "-D", str(file)], capture_output=True, text=True, check=False).stdout
        names |= set(re.findall(rf"\bU (\w+)@{re.escape(library)}\b", table))
    return names


def _defined(sources: tuple[str, ...]) -> set[str]:
    """Return the functions that the sources define."""
    text = "\n".join((SOURCES / name).read_text() for name in sources)
    return set(re.findall(r"^[A-Za-z][\w *]*?\b(\w+)\([^;{}]*\)\s*\{", text, re.MULTILINE))


def _missing_source(names: set[str]) -> str:
    """Return the source of every function that torch imports and the sources do not have."""
    lines = ["int fake_gpu_missing(const char *name);", "int fake_gpu_blas_product(void);"]
    for name in sorted(names):
        if MULTIPLIES.match(name):
            body = "return fake_gpu_blas_product();"
        elif CONFIGURES.match(name):
            body = "return 0;"
        else:
            body = f'return fake_gpu_missing("{name}");'
        lines.append(f"int {name}(void) {{ {body} }}")
    return "\n".join(lines) + "\n"


def _compile(library: str, folder: Path, torch_folder: Path) -> None:
    """Compile one library into the folder, with a function for everything that torch imports from it."""
    sources = LIBRARIES[library]
    (folder / f"{library}.c").write_text(_missing_source(_imported(library, torch_folder) - _defined(sources)))
    (folder / f"{library}.map").write_text(f"{library} {{ global: *; }};\n")
    include = _package_folder("triton") / "backends" / "nvidia" / "include"
    command = ["gcc", "-O1", "-fPIC", "-shared", "-Wall", f"-I{include}", "-o", str(folder / library)]
    command += [str(SOURCES / name) for name in sources]
    command += [str(folder / f"{library}.c"), f"-Wl,-soname,{library}", f"-Wl,--version-script={folder / library}.map"]
    if library.startswith("libcublas"):
        command.append(str(folder / "libcudart.so.13"))
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise BuildError(f"gcc cannot build {library}:\n{result.stderr}")


def build() -> Path:
    """Build the libraries once for each build of torch and each state of the sources; return their folder.

    Raises: BuildError if torch is not a CUDA 13 build or if the compiler refuses.
    """
    torch_folder = _package_folder("torch")
    content = b"".join(
        file.read_bytes() for file in [*sorted(SOURCES.iterdir()), Path(__file__), torch_folder / "version.py"]
    )
    folder = Path(tempfile.gettempdir()) / f"tandem-fake-gpu-{hashlib.sha256(content).hexdigest()[:16]}"
    if folder.exists():
        return folder
    for program in ("gcc", "nm"):
        if shutil.which(program) is None:
            raise BuildError(f"there is no {program}; expected a C compiler and binutils; install gcc")
    if not _imported("libcudart.so.13", torch_folder / "lib"):
        raise BuildError("this torch does not use CUDA 13; expected a build for it; run: pip install torch==2.14.1")
    new = Path(tempfile.mkdtemp(prefix="tandem-fake-gpu-new-"))
    try:
        for library in LIBRARIES:
            _compile(library, new, torch_folder / "lib")
        (new / "libcuda.so").symlink_to("libcuda.so.1")
        new.rename(folder)
    except OSError:  # another process was faster
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder

"""Builds the kernel library, ahead of time or (only when asked) at first use. Can be imported without torch.

Three targets share the sources in csrc/rocm_kernels: `rocm` (hipcc), `cuda` (nvcc) and `emulator` (g++, for tests).
A build goes to a folder whose name hashes everything it depends on, under a lock: of many processes that start at
once, one builds and the others load.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "rocm_kernels"
BINDING_FILES = ("autograd", "bindings")
KERNEL_FILES = ("cross_entropy", "library", "rms_norm", "rms_norm_backward", "rotary", "swiglu")
LIBRARY_NAME = "libneox_kernels.so"
DEFAULT_ARCHITECTURES = {"rocm": ("gfx90a", "gfx942"), "cuda": ("sm_80", "sm_90")}


class BuildError(RuntimeError):
    """A compiler is missing or failed; the message holds its output."""


@dataclass(frozen=True)
class Target:
    """What to build for: `kind` is rocm, cuda or emulator; `architectures` are gfx or sm names (emulator: none)."""

    kind: str
    architectures: tuple[str, ...] = ()

    @property
    def wave_size(self) -> int:
        """Lanes per wave of the architectures; BuildError if they differ or are unknown."""
        sizes = {_lanes(name) for name in self.architectures}
        if len(sizes) != 1:
            raise BuildError(f"architectures {', '.join(self.architectures)} differ in wave size: build them apart")
        return sizes.pop()


def _lanes(architecture: str) -> int:
    if architecture.startswith("sm_"):
        return 32
    if architecture.startswith("gfx9"):
        return 64
    if architecture.startswith(("gfx10", "gfx11", "gfx12")):
        return 32
    raise BuildError(f"{architecture} is not an architecture this builds for; give names such as gfx90a or sm_90")


def default_target() -> Target | None:
    """The GPU target to build here, for NEOX_GPU_ARCHS (comma-separated) or the defaults.

    None without a toolchain that fits torch: one of another major version links another runtime library than torch's.
    """
    asked = tuple(name for name in os.environ.get("NEOX_GPU_ARCHS", "").replace(" ", "").split(",") if name)
    if asked:
        return Target("cuda" if asked[0].startswith("sm_") else "rocm", asked)
    kind = None
    try:
        import torch
    except ImportError:
        return None
    if torch.version.hip and _fits("hipcc", torch.version.hip):
        kind = "rocm"
    elif torch.version.cuda and _fits("nvcc", torch.version.cuda):
        kind = "cuda"
    return Target(kind, DEFAULT_ARCHITECTURES[kind]) if kind else None


def _fits(compiler: str, torch_version: str) -> bool:
    """Whether `compiler` is there, with the major version that torch was built with, as far as it says one."""
    if shutil.which(compiler) is None:
        return False
    done = subprocess.run([compiler, "--version"], env=compiler_environment(), capture_output=True, text=True)
    found = re.search(r"(?:release|HIP version:?) (\d+)\.", done.stdout)
    return found is None or found[1] == torch_version.split(".")[0]


def compile_command(target: Target) -> list[str]:
    """The compiler and its flags for one kernel source, without `-c source -o object`."""
    common = ["-O3", "-std=c++17"]
    if target.kind == "emulator":
        return ["g++", "-x", "c++", "-O2", "-std=c++17", "-fPIC", "-Wall", "-Wextra", "-DNEOX_HOST_EMULATOR"]
    names = "+".join(target.architectures)  # nvcc takes what follows a comma as another macro
    defines = [f"-DNEOX_WAVE={target.wave_size}", f"-DNEOX_ARCHITECTURES={names}"]
    if target.kind == "rocm":
        offload = [f"--offload-arch={name}" for name in target.architectures]
        return ["hipcc", "-x", "hip", "-D__HIP_PLATFORM_AMD__=1", *common, "-fPIC", *offload, *defines]
    codes = [f"-gencode=arch=compute_{name[3:]},code={name}" for name in target.architectures]
    return ["nvcc", "-x", "cu", *common, "-Xcompiler", "-fPIC", *codes, *defines]


def compiler_environment() -> dict[str, str]:
    """The environment of a build: without HIP_PLATFORM, hipcc picks the NVIDIA platform if nvcc is on PATH."""
    return os.environ | {"HIP_PLATFORM": "amd"}


def _torch_flags(target: Target) -> tuple[list[str], list[str]]:
    try:
        import torch
    except ImportError as error:
        raise BuildError("torch cannot be imported; install with `pip install --no-build-isolation .`") from error

    root = Path(torch.__file__).parent
    abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
    standard = "c++20" if tuple(int(v) for v in torch.__version__.split(".")[:2]) >= (2, 11) else "c++17"
    includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    flags = ["-O2", f"-std={standard}", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={abi}", *includes]
    libraries = [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
    if target.kind == "emulator":
        flags.append("-DNEOX_HOST_EMULATOR")
    elif target.kind == "rocm":
        hipcc = shutil.which("hipcc")
        home = Path(os.environ.get("ROCM_PATH") or (Path(hipcc).resolve().parents[1] if hipcc else "/opt/rocm"))
        libraries += ["-ltorch_hip", f"-L{home / 'lib'}", "-lamdhip64"]
    else:
        nvcc = shutil.which("nvcc")  # may be a script that calls one elsewhere
        found = Path(nvcc).resolve().parents[1] if nvcc else None
        if found is None or not (found / "lib64/libcudart.so").exists():
            found = Path("/usr/local/cuda")
        home = Path(os.environ.get("CUDA_HOME") or found)
        libraries += ["-ltorch_cuda", f"-L{home / 'lib64'}", "-lcudart"]
    return flags, libraries


def _ninja_file(target: Target) -> str:
    flags, libraries = _torch_flags(target)
    lines = [
        f"rule kernel\n  command = {' '.join(compile_command(target))} -I{SOURCES} -c $in -o $out",
        f"rule binding\n  command = g++ {' '.join(flags)} -I{SOURCES} -c $in -o $out",
        f"rule link\n  command = g++ -shared $in {' '.join(libraries)} -o $out",
    ]
    objects = [f"{name}.o" for name in KERNEL_FILES]
    lines += [f"build {name}.o: kernel {SOURCES / name}.cu" for name in KERNEL_FILES]
    lines += [f"build {name}.o: binding {SOURCES / name}.cpp" for name in BINDING_FILES]
    objects += [f"{name}.o" for name in BINDING_FILES]
    lines.append(f"build {LIBRARY_NAME}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def cache_folder() -> Path:
    """Where libraries built at first use are kept: NEOX_CACHE, or the user's cache folder."""
    root = os.environ.get("NEOX_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "neox-llama"


def _key(target: Target) -> str:
    import torch

    digest = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*")):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(f"{torch.__version__} {sysconfig.get_platform()} {_ninja_file(target)}".encode())
    return digest.hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cached_library(target: Target) -> Path:
    """Path of the library for `target`, built now if the cache has none for these sources, torch and flags."""
    if not SOURCES.is_dir():
        raise BuildError(f"the kernel sources are not at {SOURCES}; build from a source checkout")
    names = "-".join((target.kind, *target.architectures))
    folder = cache_folder() / f"{names}-{_key(target)}"
    library = folder / LIBRARY_NAME
    if not library.exists():
        with _locked(folder.with_suffix(".lock")):
            if not library.exists():
                build_library(target, folder)
    return library


def build_library(target: Target, folder: Path) -> Path:
    """Compile and link the library into `folder`; it appears there complete or not at all."""
    ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    compiler = compile_command(target)[0]
    if ninja is None or shutil.which(compiler) is None:
        raise BuildError(f"{compiler if ninja else 'ninja'} is not on PATH; it is needed to build the kernels")
    work = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    work.mkdir(parents=True)
    try:
        (work / "build.ninja").write_text(_ninja_file(target))
        done = subprocess.run([ninja, "-C", str(work)], env=compiler_environment(), capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"building the kernels for {target} failed:\n{done.stdout}{done.stderr}")
        folder.mkdir(parents=True, exist_ok=True)
        os.replace(work / LIBRARY_NAME, folder / LIBRARY_NAME)
    finally:
        shutil.rmtree(work)
    return folder / LIBRARY_NAME

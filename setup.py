"""Builds the package's two libraries with ninja; everything that is only declared stands in pyproject.toml.

fusedrnn/_ops.so          the operators: LibTorch stable ABI, no Python in it; one file serves every torch from 2.10 on
fusedrnn/_C.<python>.so   pybind11, no torch in it: the build record, the cells' traits, the processor's capability

Environment: FUSEDRNN_CUDA=0/1 (default: when torch has CUDA and nvcc is found), TORCH_CUDA_ARCH_LIST, CUDA_HOME,
MAX_JOBS, CXX, CXXFLAGS (for every compile and link, such as -g -fsanitize=address).
"""
import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = (2, 10)  # the oldest torch that is served, whatever the headers at hand could offer besides
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*TORCH_TARGET)
# Not -ffast-math: infinities and NaN must come out as torch lets them out.
MATH = "-fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=fast"
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mprefer-vector-width=512"
ISA_FLAGS = {  # a file of csrc/cpu whose name ends so is compiled with these besides, and no other file is
    "baseline": "", "avx2": "-mavx2 -mfma -mf16c", "avx512": AVX512, "avx512dots": AVX512 + " -mavx512vnni -mavx512bf16"}
SPILLS = "-Xptxas -v,-warn-spills,-warn-lmem-usage,-Werror"  # an error; what a kernel needs of a GPU is left beside its object
# No OpenMP library at the link: its functions are found in the runtime that torch brings, so that there is only one.
RULES = """rule compile
  command = $compiler -MD -MF $out.d -c $in -o $out > $out.txt 2>&1; code=$$?; grep -v "ptxas info\\|bytes stack" $out.txt; exit $$code
  depfile = $out.d
  deps = gcc
  description = $in
rule link
  command = $linker -shared $in -o $out $libraries
  description = $out
"""


def isa_of(source):
    """The instruction set a source is compiled for: its name's suffix, or "baseline"."""
    return next((isa for isa in ISA_FLAGS if Path(source).stem.endswith("_" + isa)), "baseline")


def sources(machine=os.uname().machine):
    """Paths from the root: (the operators' C++, their CUDA, the Python module's C++)."""
    cpp, cuda = (sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))
                 for pattern in ("csrc/cpu/*.cpp", "csrc/cuda/*.c*[!h]"))
    cpp = [source for source in cpp if machine.lower() in ("x86_64", "amd64") or isa_of(source) == "baseline"]
    return ["csrc/ops.cpp", *cpp], cuda, ["csrc/module.cpp", "csrc/cpu/capability.cpp"]


def cuda_why_not(env, torch_cuda, nvcc):
    """Why CUDA is not built, or "": given torch.version.cuda, and nvcc's path or None."""
    wanted = env.get("FUSEDRNN_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"fusedrnn: FUSEDRNN_CUDA must be 0, 1 or unset, got {wanted!r}")
    if wanted == "1" and not nvcc:
        sys.exit("fusedrnn: FUSEDRNN_CUDA=1 needs nvcc, found neither in CUDA_HOME/bin nor on PATH; FUSEDRNN_CUDA=0 "
                 "builds for the CPU alone")
    return ("FUSEDRNN_CUDA=0" if wanted == "0" else "this torch has no CUDA" if not (wanted or torch_cuda)
            else "" if nvcc else "nvcc was not found")


def gencode(archs):
    """nvcc's flags for a TORCH_CUDA_ARCH_LIST such as "8.0;9.0a+PTX"."""
    flags = []
    for arch in filter(None, re.split(r"[;,\s]+", archs)):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
        if not match:
            sys.exit(f"fusedrnn: TORCH_CUDA_ARCH_LIST takes entries such as 8.0, 9.0a or 9.0+PTX, got {arch!r}")
        chip = match[1] + match[2]
        flags += [f"-gencode=arch=compute_{chip},code={kind}_{chip}" for kind in ["sm"] + ["compute"] * bool(match[3])]
    return " ".join(flags)


def compiler_name(cxx):
    """Name and version of g++: torch's OpenMP runtime is GCC's, and no -std is passed, so 17 must be its default."""
    query = subprocess.run(f"{cxx} -dM -E -x c++ /dev/null", shell=True, capture_output=True, text=True).stdout
    macros = dict(line.split(" ", 2)[1:] for line in query.splitlines() if line.count(" ") > 1)
    if "__clang__" in macros or macros.get("__cplusplus", "") < "201703L":
        sys.exit(f"fusedrnn: needs g++ 11 or newer, and {cxx!r} is {macros.get('__VERSION__', 'no C++ compiler')}")
    return f"{Path(cxx.split()[0]).name} {macros['__VERSION__'].strip(chr(34))}"


def library(path, compilers, linker, libraries=""):
    """Ninja's lines for one shared library; compilers has the compiler and its flags for each source."""
    lines = [f"build {path}/{source}.o: compile {source}\n  compiler = {compilers[source]}\n" for source in compilers]
    objects = " ".join(f"{path}/{source}.o" for source in compilers)
    return "".join(lines) + f"build {path}.so: link {objects}\n  linker = {linker}\n  libraries = {libraries}\n"


class NinjaBuild(build_ext):
    """torch's own BuildExtension has no flags per file, and its CUDAExtension refuses a torch without CUDA."""

    def get_ext_filename(self, name):
        return name.replace(".", "/") + ".so" if name.endswith("_ops") else super().get_ext_filename(name)

    def build_extensions(self):
        version = next((found.version for found in metadata.distributions(name="torch")), "none")
        if version == "none" or tuple(map(int, version.split(".")[:2])) < TORCH_TARGET:
            sys.exit("fusedrnn: building needs torch {}.{} or newer, found {}".format(*TORCH_TARGET, version))
        import ninja
        import pybind11
        import torch
        env, torch_dir, (cpp, kernels, module) = os.environ, Path(torch.__file__).parent, sources()
        cxx, jobs = env.get("CXX") or "g++", env.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        nvcc = shutil.which("nvcc", path=f"{env.get('CUDA_HOME', '')}/bin{os.pathsep}{env.get('PATH', '')}")
        why_not = cuda_why_not(env, torch.version.cuda, nvcc)
        archs = "" if why_not else env.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0+PTX"
        flags = f"-O3 -fPIC -fvisibility=hidden -Wall {env.get('CXXFLAGS', '')}".strip()
        record = {"version": self.distribution.get_version(), "compiler": compiler_name(cxx),
                  "isas": {isa: ISA_FLAGS[isa] for isa in ISA_FLAGS if isa in map(isa_of, cpp)},
                  "flags": f"{flags} {MATH} {STABLE_ABI}", "torch": torch.__version__,
                  "cuda": not why_not, "cuda_archs": archs, "cuda_why_not": why_not}
        print("fusedrnn {version}: CPU {}; {}; {compiler}, torch {torch}, {} jobs".format(", ".join(record["isas"]),
              f"CUDA {archs}" if archs else f"no CUDA ({why_not})", jobs, **record), flush=True)
        # Beside the sources and not in the folder that pip throws away: the next build compiles only what has changed.
        out = Path("build", sysconfig.get_config_var("SOABI"))
        out.mkdir(parents=True, exist_ok=True)
        fcntl.flock(lock := open(out / "lock", "w"), fcntl.LOCK_EX)  # two builds at once would write the same objects
        header, text = out / "build_record.h", f'constexpr char kBuildRecord[] = R"json({json.dumps(record)})json";\n'
        if not header.exists() or header.read_text() != text:
            header.write_text(text)
        stable = f"-isystem {shlex.quote(f'{torch_dir}/include')} {STABLE_ABI}"
        python = shlex.join(f"-I{path}" for path in (out, sysconfig.get_path("include"), pybind11.get_include()))
        compilers = {source: f"{cxx} {flags} {stable} {MATH} {ISA_FLAGS[isa_of(source)]}" for source in cpp}
        device = f"{nvcc} -ccbin {cxx} -O3 {SPILLS} -Xcompiler -fPIC,-fvisibility=hidden {stable} {gencode(archs)}"
        compilers |= dict.fromkeys(kernels if archs else [], device)
        (out / "build.ninja").write_text(
            f"builddir = {out}\n{RULES}"
            + library(f"{out}/_C", dict.fromkeys(module, f"{cxx} {flags} {python}"), f"{cxx} {flags}")
            + library(f"{out}/_ops", compilers, f"{nvcc} -ccbin {cxx} -cudart static" if archs else f"{cxx} {flags}",
                      f"-L{shlex.quote(f'{torch_dir}/lib')} -ltorch_cpu -lc10"))
        self.spawn([f"{ninja.BIN_DIR}/ninja", "-f", f"{out}/build.ninja", "-j", jobs])
        for extension in self.extensions:
            target = self.get_ext_fullpath(extension.name)
            self.mkpath(os.path.dirname(target))
            self.copy_file(out / (extension.name.rpartition(".")[2] + ".so"), target)


if __name__ == "__main__":
    setup(cmdclass={"build_ext": NinjaBuild},
          ext_modules=[Extension(f"fusedrnn.{name}", []) for name in ("_ops", "_C")])

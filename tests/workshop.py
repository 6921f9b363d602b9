"""What the tests of C++ share: a workshop that compiles and links their programs, and how to run them."""

import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
_spec = importlib.util.spec_from_file_location("fusedrnn_setup", ROOT / "setup.py")
setup = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(setup)

WARN = "-Wall -Wextra -Wno-psabi -Wno-unknown-pragmas"
UNDEFINED = "-g1 -O1 -fsanitize=address,undefined -fno-sanitize-recover=all"
# For kernels: checks by calls, and without those of UBSan's that AddressSanitizer implies. It halves the time to compile.
ADDRESS = f"{UNDEFINED} -fno-sanitize=null,object-size,pointer-overflow,vptr --param asan-instrumentation-with-call-threshold=0"
THREAD = "-g1 -O1 -fsanitize=thread"


class CudaLibrary:
    """The library with CUDA, whose build takes minutes: it goes on in the background, behind what else runs.

    Args:
        folder: of its own, where an earlier build's objects may lie, or else those of the CPU's build, which have the same commands
    """

    SOURCES = ["setup.py", "pyproject.toml", "README.md", "csrc", "fusedrnn"]

    def __init__(self, folder):
        self.folder = folder
        for objects in ROOT.glob("build/cpython-*"):
            if not (folder / "build" / objects.name).exists():
                shutil.copytree(objects, folder / "build" / objects.name)
        for name in self.SOURCES:
            if (ROOT / name).is_dir():
                ignored = shutil.ignore_patterns("*.so", "__pycache__")
                shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True, ignore=ignored)
            else:
                shutil.copy2(ROOT / name, folder / name)
        self.log = folder / "build.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["nice", sys.executable, "setup.py", "build_ext", "--inplace"], cwd=folder, stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, "FUSEDRNN_CUDA": "1"}, start_new_session=True)  # fmt: skip

    def result(self):
        """What the build printed, as soon as it is done."""
        code, text = self.process.wait(timeout=1800), self.log.read_text()
        assert code == 0, text[-6000:]
        return text

    def close(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)  # with its compilers
            self.process.wait()


class Workshop:
    """Compiles in the background, two at a time or as many as there are cores, and keeps what has not changed since.

    Args:
        request, tmp_path_factory: pytest's, of the fixture that makes the workshop
        name: of the folder for its programs, and of that in pytest's cache for its objects
    """

    def __init__(self, request, tmp_path_factory, name):
        cache = getattr(request.config, "cache", None)
        self.folder = tmp_path_factory.mktemp(name)
        self.store = cache.mkdir(f"fusedrnn_{name}") if cache else self.folder
        self.futures = {}
        self.pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))

    def compile(self, name, source, flags, includes, inputs):
        """Starts to compile a file to the object `name`.

        Args:
            source: the file
            flags: all but those of `includes`
            includes: the folders of headers, as flags; they may be others the next time
            inputs: the files, source and headers, whose change must be noticed
        """
        self.futures[name] = self.pool.submit(self._compile, name, source, flags, includes, inputs)

    def _compile(self, name, source, flags, includes, inputs):
        digest = hashlib.sha256(f"{source.name} {flags} {setup.compiler_name('g++')}".encode())
        for path in inputs:
            digest.update(path.name.encode() + path.read_bytes())
        out = self.store / f"{name}-{digest.hexdigest()[:16]}.o"
        if not out.exists():
            for old in self.store.glob(f"{name}-{'?' * 16}.o"):
                old.unlink()
            made = self.folder / f"{name}.o"
            run(f"g++ {WARN} {flags} {includes} -c {source} -o {made}")
            shutil.move(made, out)
        return out

    def link(self, name, objects, flags=""):
        """The program `name` of these objects, as soon as they are there."""
        program = self.folder / name
        run(f"g++ {flags} {' '.join(str(self.futures[name].result()) for name in objects)} -pthread -o {program}")
        return program

    def close(self):
        self.pool.shutdown(cancel_futures=True)


class EngineWorkshop(Workshop):
    """A workshop for one of csrc's engines and the tests of it, or for edited copies of the engine.

    Args:
        request, tmp_path_factory, name: a Workshop's
        engine: the engine's folder in csrc
        tests: the folders of what tests it
        below: the headers that the engine itself includes from elsewhere
        flags: where they are
    """

    SHARED = ["arena.h", "frozen.h", "params.h"]  # what an engine needs beside its folder and the cells

    def __init__(self, request, tmp_path_factory, name, engine, tests, below=(), flags=""):
        super().__init__(request, tmp_path_factory, name)
        self.parts, self.tests, self.below, self.trees = ("cells", engine), tests, list(below), {"csrc": CSRC}
        self.includes = " ".join([*(f"-I{folder}" for folder in tests), flags])

    def copy(self, name):
        """A copy of the engine's sources to be edited, known as tree `name`."""
        tree = self.trees[name] = self.folder / name
        for part in self.parts:
            shutil.copytree(CSRC / part, tree / part)
        for header in self.SHARED:
            shutil.copy(CSRC / header, tree)
        return tree

    def compile(self, name, source, flags, tree="csrc"):
        """Starts to compile `source`, a file of the tree or of its tests, to the object `name`."""
        folder = self.trees[tree]
        ours = [tests / source for tests in self.tests if (tests / source).exists()]
        inputs = [path for part in self.parts for path in sorted((folder / part).iterdir())]
        inputs += [folder / header for header in self.SHARED] + self.below
        if ours:
            inputs += [path for tests in self.tests for path in sorted(tests.iterdir())]
        super().compile(name, ours[0] if ours else folder / source, flags, f"-I{folder} {self.includes}", inputs)

    def take(self, name, source, flags):
        """The object that the library's own build made of `source`, if nothing has changed since, or else `compile`."""
        built = ROOT / "build" / str(sysconfig.get_config_var("SOABI")) / "_ops" / "csrc" / f"{source}.o"
        inputs = [CSRC / source, *(path for part in self.parts for path in (CSRC / part).iterdir())]
        inputs += [CSRC / header for header in self.SHARED]
        if not built.exists() or built.stat().st_mtime <= max(path.stat().st_mtime for path in inputs):
            return self.compile(name, source, flags)
        self.futures[name] = Future()
        self.futures[name].set_result(built)


def edit(path, pattern, replacement):
    """Replaces all of `pattern` in a file and returns how often; it must be there at all."""
    text, count = re.subn(pattern, replacement, path.read_text())
    assert count, f"{path.name} no longer has {pattern}: this test must follow its source"
    path.write_text(text)
    return count


def cuda_headers():
    """The folders of the CUDA toolkit's headers as flags, or None if there is no toolkit."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    found = [Path(home) / "include" for home in homes if home and (Path(home) / "include" / "cuda_bf16.h").exists()]
    return f"-isystem {found[0]} -isystem {found[0]}/cccl" if found else None


def run(command, expect=0, timeout=400, **variables):
    """What a command prints, once it has ended with the status `expect`."""
    done = subprocess.run(str(command), shell=True, text=True, timeout=timeout, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env={**os.environ, **variables})
    assert done.returncode == expect, f"status {done.returncode} of: {command}\n{done.stdout[-8000:]}"
    return done.stdout


def run_sanitized(command, expect=0):
    """A program under a sanitizer. They map fixed addresses, which a randomly laid out process may have taken."""
    fixed = "setarch -R " if subprocess.run("setarch -R true", shell=True, stderr=subprocess.DEVNULL).returncode == 0 else ""
    return run(fixed + str(command), expect, ASAN_OPTIONS="detect_leaks=0", UBSAN_OPTIONS="print_stacktrace=1",
               TSAN_OPTIONS="halt_on_error=1 exitcode=66")

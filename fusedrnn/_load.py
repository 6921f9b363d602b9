"""Loads the two built libraries, or says in one ImportError what was found, what is needed and what mends it."""

import importlib
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from ._version import __version__

FOLDER = Path(__file__).absolute().parent
MIN_TORCH = (2, 10)
BUILD = "pip install --no-build-isolation -v ."
SOURCES = " (in the folder with fusedrnn's setup.py)"


def load() -> ModuleType:
    """Imports fusedrnn._C and loads _ops.so into torch.ops.

    Returns: the module fusedrnn._C.
    Raises: ImportError, one line, where torch or a library is missing, too old, or made for something else.
    """
    torch = _import_torch()
    extension = _import_extension()
    built = extension.build_record()["version"]
    if built != __version__:
        _fail(f"libraries of version {built} in {FOLDER}", f"libraries of its own version {__version__}", BUILD + SOURCES)
    operators = FOLDER / "_ops.so"
    if not operators.exists():
        _fail(f"no _ops.so in {FOLDER}", "its built operators", BUILD + SOURCES)
    try:
        torch.ops.load_library(operators)
    except OSError as error:
        _fail(f"{operators}, which does not load ({_one_line(error.__cause__ or error)})",
              f"operators that load with torch {torch.__version__}", BUILD + SOURCES, error)
    return extension


def _import_torch() -> Any:
    needed = f"torch {'.'.join(map(str, MIN_TORCH))} or newer"
    mend = f'"{sys.executable}" -m pip install "torch>={MIN_TORCH[0]}.{MIN_TORCH[1]}"'
    try:
        import torch
    except ImportError as error:
        _fail(f"no torch that imports ({_one_line(error)})", needed, mend, error)
    if tuple(map(int, torch.__version__.split(".")[:2])) < MIN_TORCH:
        _fail(f"torch {torch.__version__}", needed, mend)
    return torch


def _import_extension() -> ModuleType:
    python = sysconfig.get_config_var("SOABI")
    needed = f"one built for this Python, {python}"
    library = FOLDER / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    # Looked for before it is imported: an editable install elsewhere would lend this package its own.
    if not library.exists():
        others = ", ".join(sorted(path.name.split(".")[1] for path in FOLDER.glob("_C.*.so")))
        found = f"libraries built for {others} in {FOLDER}" if others else f"no built library in {FOLDER}"
        _fail(found, needed, BUILD + SOURCES)
    try:
        return importlib.import_module("._C", __package__)
    except ImportError as error:
        _fail(f"{library}, which does not load ({_one_line(error)})", needed, BUILD + SOURCES, error)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _fail(found: str, needed: str, mend: str, cause: BaseException | None = None) -> NoReturn:
    raise ImportError(f"fusedrnn {__version__} found {found}, and needs {needed}. To mend it: {mend}") from cause

"""Put fusedrnn's layers in the place of torch.nn's, for packages that are to run as they are."""

import importlib
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch

from .convert import FUSED_OF_STOCK

DYNAMO = "torch._dynamo.variables.builder"
_active: list["Patch"] = []  # in the order in which they were made


class Patch:
    """What `patch` did, until `undo`. As a context manager it undoes at exit."""

    def __init__(self, modules: Iterable[ModuleType] = ()) -> None:
        """Put the classes in place: see `patch`."""
        self._replaced = {
            (home, stock.__name__): (getattr(home, stock.__name__), fused)
            for home in (torch.nn, torch.nn.modules, torch.nn.modules.rnn) for stock, fused in FUSED_OF_STOCK.items()
        }
        for module in modules:
            if not isinstance(module, ModuleType):
                raise TypeError(f"fusedrnn.patch: modules must hold imported modules, got {module!r}")
            self._replaced |= {(module, name): (value, FUSED_OF_STOCK[value]) for name, value in vars(module).items()
                               if isinstance(value, type) and value in FUSED_OF_STOCK}
        for (module, name), (_, fused) in self._replaced.items():
            setattr(module, name, fused)
        if not _active:
            _compiler.start()
        _active.append(self)

    def undo(self) -> None:
        """Put back what was there before. A second time it does nothing.

        Raises:
            RuntimeError: a later patch is not undone yet, or something else has taken a place since. Nothing is put back then.
        """
        if self not in _active:
            return
        if self is not _active[-1]:
            raise RuntimeError("fusedrnn.patch: the last patch must be undone first: "
                               f"expected patch {len(_active)}, got patch {_active.index(self) + 1}")
        for (module, name), (_, fused) in self._replaced.items():
            now = vars(module).get(name)
            if now is not fused:
                raise RuntimeError(f"fusedrnn.patch: {module.__name__}.{name} was replaced since: expected {fused}, got {now}")
        for (module, name), (before, _) in self._replaced.items():
            setattr(module, name, before)
        _active.pop()
        if not _active:
            _compiler.stop()

    def __enter__(self) -> "Patch":
        if self not in _active:
            raise RuntimeError("fusedrnn.patch: this patch is undone; a new call of fusedrnn.patch() makes another")
        return self

    def __exit__(self, *_: Any) -> None:
        self.undo()


def patch(modules: Iterable[ModuleType] = ()) -> Patch:
    """Make torch.nn.RNN, LSTM, GRU, RNNCell, LSTMCell and GRUCell fusedrnn's, so that packages use them as they are.

    Names that are looked up in torch.nn from now on are ours, in all threads: layers built, subclasses made, pickled models
    loaded, isinstance. What was there before stays what it was: layers (`fusedrnn.convert` turns them), subclasses, and
    names that a module took with `from torch.nn import LSTM`, unless `modules` says so. While it holds, a layer of torch's
    own is no instance of torch.nn.LSTM and can be copied but not pickled (its state_dict can). What was built while it held
    stays ours after.

    torch.compile sees both kinds of layers as it always does: ours in one graph, torch's own not, unless its setting allow_rnn
    says so.

    Args:
        modules: modules imported already, whose own global names for torch.nn's classes are replaced too. Those of a package are
            among the values of sys.modules.

    Returns:
        an object with `undo()`, which is also a context manager that undoes at exit. Patches nest, and are undone in the reverse
        order.

    Raises:
        TypeError: something in modules is no module.

    >>> import torch
    >>> with patch():
    ...     layer = torch.nn.Sequential(torch.nn.LSTM(3, 5))[0]
    >>> type(layer).__module__, torch.nn.LSTM.__module__
    ('fusedrnn.modules', 'torch.nn.modules.rnn')
    """
    return Patch(modules)


class _Compiler:
    """Shows torch._dynamo the torch.nn of before: it refuses instances of torch.nn.LSTM and its kin, and would refuse ours.

    One module of it asks. To import that takes as long as to import torch, and who does not compile may never need it: as long
    as it is not here, this waits for it among Python's finders.
    """

    def start(self) -> None:
        if DYNAMO in sys.modules:
            self._show(importlib.import_module(DYNAMO))  # waits if another thread is still importing it
        else:
            sys.meta_path.insert(0, self)

    def stop(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        if DYNAMO in sys.modules:
            sys.modules[DYNAMO].torch = torch  # type: ignore[attr-defined]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != DYNAMO:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec: Any = next(filter(None, others), None)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_show(module: ModuleType) -> None:
                execute(module)
                if _active:
                    self._show(module)

            spec.loader.exec_module = execute_and_show
        return spec

    def _show(self, module: ModuleType) -> None:
        view = _View(torch.nn, **{stock.__name__: stock for stock in FUSED_OF_STOCK})
        module.torch = _View(torch, nn=view)  # type: ignore[attr-defined]


class _View(ModuleType):
    """A module as it is, but for some attributes."""

    def __init__(self, module: ModuleType, **own: Any) -> None:
        super().__init__(module.__name__)
        vars(self).update(own, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


_compiler = _Compiler()

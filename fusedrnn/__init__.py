"""torch.nn's recurrent layers on another engine: same constructors, parameters, results and errors; faster.

    import fusedrnn
    lstm = fusedrnn.LSTM(28, 128)            # was torch.nn.LSTM(28, 128)
    model = fusedrnn.convert(model)          # or: every stock layer of a model, in place
    fusedrnn.patch()                         # or: torch.nn's own names, for packages that are to run as they are
    frozen = fusedrnn.freeze(model)          # for low latency on a CPU: weights packed once, in float32, bfloat16 or int8
    print(fusedrnn.explain(lstm, x))         # which kernel runs this call, and why no other
"""

from . import _load

_load.load()  # the engine's shared libraries: one clear error here instead of an obscure one at the first call

from . import functional  # noqa: E402
from ._version import __version__  # noqa: E402
from .cells import GRUCell, LSTMCell, RNNCell  # noqa: E402
from .convert import convert  # noqa: E402
from .explain import explain  # noqa: E402
from .freeze import freeze  # noqa: E402
from .modules import GRU, LSTM, RNN  # noqa: E402
from .newer import SLSTM, IndRNN, LayerNormGRU, LayerNormLSTM  # noqa: E402
from .patch import patch  # noqa: E402

__all__ = ["GRU", "GRUCell", "IndRNN", "LSTM", "LSTMCell", "LayerNormGRU", "LayerNormLSTM", "RNN", "RNNCell", "SLSTM", "__version__",
           "convert", "explain", "freeze", "functional", "patch"]

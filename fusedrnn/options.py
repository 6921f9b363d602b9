"""What the layers' constructors take that torch.nn's do not: the names, and what values they may have."""

from __future__ import annotations

import math
from typing import Any

from .reference import GATE_FUNCTIONS, VALUE_FUNCTIONS

RATES = ("zoneout", "recurrent_dropout", "weight_dropout")
#: Those that make another cell of a layer, in training or not, and what they are where they do not.
FORM: dict[str, Any] = {"peepholes": False, "coupled": False, "gate_activation": "sigmoid", "activation": "tanh",
                        "cell_clip": None, "num_heads": 1, "reset_after": True}


def checked(who: str, name: str, value: Any) -> Any:
    """An option's value as the layers keep it.

    Args:
        who: "fusedrnn.LSTM", for messages and for what only an LSTM has.
        name: of the option.
        value: the caller's.

    Returns:
        the value; a rate as a float, two that are alike as one.

    Raises:
        ValueError: it is none that the option may have.
    """
    lstm = who.endswith((".LSTM", ".LayerNormLSTM"))
    two = isinstance(value, (tuple, list)) and len(value) == 2 and lstm
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name in RATES:
        pair = two and name == "zoneout"
        for rate in value if pair else (value,):
            if not isinstance(rate, (int, float)) or isinstance(rate, bool) or not 0 <= rate < 1:
                of_both = ", or two of them, of h and of c" if name == "zoneout" and lstm else ""
                raise ValueError(f"{who}: {name} must be a probability from 0 to below 1{of_both}, got {value!r}")
        return tuple(float(rate) for rate in value) if pair else float(value)
    if name == "activation":
        for function in value if two else (value,):
            if not isinstance(function, str) or function not in VALUE_FUNCTIONS:
                of_both = ", or two of them, of the candidate and of the output" if lstm else ""
                raise ValueError(f"{who}: activation must be one of {_list(VALUE_FUNCTIONS)}{of_both}, got {value!r}")
        return value if not two else value[0] if value[0] == value[1] else tuple(value)
    fits, expected = {
        "save": (value in ("all", "states"), "'all' or 'states'"),
        "forget_bias": (value is None or number, "a number or None"),
        "peepholes": (isinstance(value, bool), "True or False"),
        "coupled": (isinstance(value, bool), "True or False"),
        "reset_after": (isinstance(value, bool), "True or False"),
        "gate_activation": (isinstance(value, str) and value in GATE_FUNCTIONS, f"one of {_list(GATE_FUNCTIONS)}"),
        "cell_clip": (value is None or number and 0 < value < math.inf, "a positive number or None"),
        "num_heads": (isinstance(value, int) and number and value > 0, "a positive integer"),
    }[name]
    if not fits:
        raise ValueError(f"{who}: {name} must be {expected}, got {value!r}")
    return value


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names))

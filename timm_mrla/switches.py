"""Reads switches that a user typed in the environment or on a command line."""

_ON, _OFF = ('1', 'true', 't', 'yes', 'y', 'on'), ('0', 'false', 'f', 'no', 'n', 'off', 'none', '')


def is_on(name: str, value: object) -> bool:
    """Whether a switch is on, by its value: a bool, 0 or 1, None, or a word such as 'false'; else ValueError."""
    word = str(value).strip().lower()
    if word not in _ON + _OFF:
        raise ValueError(f'{name} {value!r} is neither on nor off: say true or false')
    return word in _ON

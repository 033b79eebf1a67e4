"""Which cores compute: those of the C++ extension, or their Python twin."""

from typing import Any

from optima_fast.bandit import _cores

_ABI = 3

cores: Any
try:
    from optima_fast import _bandit
except ImportError:
    BACKEND, cores = "python", _cores
else:
    if _bandit.ABI != _ABI:
        raise ImportError(
            f"optima_fast._bandit must have ABI {_ABI}, got {_bandit.ABI}: reinstall optima-fast, "
            f"or delete {_bandit.__file__}"
        )
    BACKEND, cores = "c++", _bandit

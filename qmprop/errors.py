"""Exceptions a caller can act on: what happened, what to do next, and a stable code."""

from __future__ import annotations


class QmpropError(Exception):
    """Base of every error qmprop raises on purpose.

    Args:
        message: What is wrong and where, in one sentence.
        hint: What to do next, in one sentence; may be empty.
    """

    code = "error"
    exit_status = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[QmpropError], tuple[str, str]]:
        return (type(self), (self.message, self.hint))


class UsageError(QmpropError):
    """An argument has a value that is not allowed; exit status 2."""

    code = "usage"
    exit_status = 2


class WeightsError(QmpropError):
    """A weights file is missing, damaged, or not one of qmprop's."""

    code = "weights"


class OutputError(QmpropError):
    """An output cannot be written."""

    code = "output"


class DeviceError(QmpropError):
    """The requested compute device does not exist here."""

    code = "device"


class DataError(QmpropError):
    """A data set is missing, damaged, or not what it should be."""

    code = "data"


class ConfigError(UsageError):
    """A configuration value is unknown or not allowed."""

    code = "config"


class TrainingError(QmpropError):
    """Training had to stop."""

    code = "training"

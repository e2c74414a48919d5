"""Every error and warning class of the package.

A message names the value, says what is allowed and, where possible, gives the corrected line.
"""


class AdaLoraError(Exception):
    """Base class of all errors raised on purpose by adalora."""


class ConfigError(AdaLoraError, ValueError):
    """A setting is out of range, unknown, or contradicts another one."""


class AttachError(AdaLoraError, ValueError):
    """A model cannot be made adaptive: no LoRA layer, an unsupported LoRA variant, already attached."""


class CheckpointError(AdaLoraError, RuntimeError):
    """A checkpoint is missing, damaged, foreign, or does not fit the model or config."""


class CompactionError(AdaLoraError, RuntimeError):
    """Pruned triplets cannot be removed safely here."""


class TrainingError(AdaLoraError, RuntimeError):
    """A run cannot go on: it has diverged, or memory is exhausted (`OutOfMemory`)."""


class OutOfMemory(TrainingError):
    """A run needs more memory than there is; the message says what to lower."""


class StorageError(AdaLoraError, RuntimeError):
    """A result cannot be written: the disk is full or read-only. The message says where it is instead."""


class AdapterFileError(AdaLoraError, ValueError):
    """An adapter on disk is missing, malformed, unsafe, or cannot be written in the wanted format."""


class RecipeError(AdaLoraError, ValueError):
    """A recipe or suite file is wrong: the message names the field, the value and what is allowed."""


class DataError(AdaLoraError, ValueError):
    """A data set cannot be found or does not have the columns that were named."""


class HistoryError(AdaLoraError, ValueError):
    """A run's history is missing, malformed, or does not hold what is asked of it."""


class AdaLoraWarning(UserWarning):
    """Something is not as the user would expect; the message carries its cure."""

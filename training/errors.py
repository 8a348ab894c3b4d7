"""The exceptions a user can mend, in one tree.

    CorralError
    ├── ConfigError            a YAML file or key=value override
    ├── BaseModelError         a base model that cannot be found, read or used
    ├── ChatFormatError        a dialog that the chat format cannot render
    ├── DatasetError           a dataset file or row
    ├── TrainingError          a run that diverged or was given what the cluster lacks
    ├── RunStopped             a run that SIGTERM or Ctrl-C ended; its name resumes it
    ├── ExportError            an adapter that cannot be written as a model of its own
    └── RegistryError          the adapter registry
        ├── AdapterNotFound    no such adapter, version or alias
        ├── RegistryConflict   a change that aliases or canaries stand against
        └── AdapterRefused     an adapter that must not be registered or loaded

`str(error)` is one line: what was wrong, what was given, what to do next. The serving side derives its
own errors from `CorralError` too (`deployments.errors`).
"""


class CorralError(Exception):
    """A failure whose message is written for the person who can mend it."""


class ConfigError(CorralError):
    """A configuration key or value that is not accepted."""


class BaseModelError(CorralError):
    """A base model that cannot be found, downloaded, converted or used."""


class ChatFormatError(CorralError):
    """A dialog that has no rendering; `message_index` is the offending message, if one is."""

    def __init__(self, message: str, message_index: int | None = None) -> None:
        super().__init__(message)
        self.message_index = message_index


class DatasetError(CorralError):
    """A dataset file or row that cannot be used."""


class TrainingError(CorralError):
    """A run that cannot start or must not go on."""


class RunStopped(CorralError):
    """A run that SIGTERM or Ctrl-C ended."""

    def __init__(self, run_name: str) -> None:
        super().__init__(f"run {run_name!r} was stopped: run_name={run_name} resumes it from its last checkpoint")
        self.run_name = run_name


class ExportError(CorralError):
    """A merged model or GGUF file that cannot be written."""


class RegistryError(CorralError):
    """The adapter registry cannot do what was asked."""


class AdapterNotFound(RegistryError):
    """No such adapter, version or alias."""


class RegistryConflict(RegistryError):
    """What was asked does not go with where aliases and canaries point."""


class AdapterRefused(RegistryError):
    """The adapter fails a check and is neither registered nor loaded."""

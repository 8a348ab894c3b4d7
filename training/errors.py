"""The exceptions whose cause a user can fix, in one tree.

    CorralError
    ├── ConfigError            a YAML file or key=value override
    ├── BaseModelError         a base model that cannot be found, read or used
    ├── ChatFormatError        a dialog that the chat format cannot render
    ├── DatasetError           a dataset file or row
    ├── TrainingError          a run that diverged, or needs resources that do not exist
    ├── RunStopped             a run that was ended by SIGTERM or Ctrl-C; its name resumes it
    ├── ExportError            an adapter that cannot be exported as a standalone model
    └── RegistryError          the adapter registry
        ├── AdapterNotFound    no such adapter, version or alias
        ├── RegistryConflict   a change that conflicts with an alias or canary
        └── AdapterRefused     an adapter that must not be registered or loaded

`str(error)` is one line: what was wrong, what was given, what to do next. The errors of serving derive from
`CorralError` too (`deployments.errors`).
"""


class CorralError(Exception):
    """A failure whose message is written for the person who can fix it."""


class ConfigError(CorralError):
    """A configuration key or value that is not accepted."""


class BaseModelError(CorralError):
    """A base model that cannot be found, downloaded, converted or used."""


class ChatFormatError(CorralError):
    """A dialog that cannot be rendered; `message_index` is the offending message, or None."""

    def __init__(self, message: str, message_index: int | None = None) -> None:
        super().__init__(message)
        self.message_index = message_index


class DatasetError(CorralError):
    """A dataset file or row that cannot be used."""


class TrainingError(CorralError):
    """A run that cannot start or must not continue."""


class RunStopped(CorralError):
    """A run that was ended by SIGTERM or Ctrl-C."""

    def __init__(self, run_name: str) -> None:
        super().__init__(f"run {run_name!r} was stopped: run_name={run_name} resumes it from its last checkpoint")
        self.run_name = run_name


class ExportError(CorralError):
    """A merged model or GGUF file that cannot be exported."""


class RegistryError(CorralError):
    """An operation that the adapter registry cannot perform."""


class AdapterNotFound(RegistryError):
    """No such adapter, version or alias."""


class RegistryConflict(RegistryError):
    """A change that conflicts with an alias or canary."""


class AdapterRefused(RegistryError):
    """An adapter that fails a check; it is neither registered nor loaded."""

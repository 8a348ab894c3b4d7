"""The schema of serve YAMLs: Corral's own `args:` as strict types, and a check of everything around them.

Ray silently drops unknown keys under `deployments:` and `autoscaling_config:`, so `check_serve_config` compares the
entire file with Ray's schema before anything is deployed.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deployments.auth.keys import KeyStore
from deployments.errors import ServeConfigError
from deployments.launch.tls import check_tls_files
from training.base_models.embedded import EMBEDDED_MODEL
from training.base_models.nf4 import Quantization
from training.chat.default_system import ChatSettings


class _StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineArgs(_StrictModel):
    """Size of one replica's engine."""

    max_model_len: int | None = Field(
        None, ge=8, description="maximum prompt plus answer in tokens; default: the base's"
    )
    max_num_seqs: int = Field(32, ge=1, description="maximum number of sequences that run at once; the others wait")
    max_num_batched_tokens: int = Field(256, ge=32, description="maximum tokens per step; longer prompts are split")
    kv_cache_gib: float | None = Field(
        None, gt=0, description="memory for keys and values; default: 1 on a CPU, 90 % of the free memory on CUDA"
    )
    max_loras: int = Field(8, ge=1, description="maximum number of adapters loaded at once")
    chunks_per_s: float | None = Field(
        None,
        gt=0,
        description="maximum chunks per second over all streams of a replica; above it tokens are merged into larger "
        "chunks, so that first tokens are not delayed; default: 50 per CPU core",
    )
    num_threads: int | None = Field(None, ge=1, description="torch threads on a CPU; default: all cores")


class StoredResponsesArgs(_StrictModel):
    """How long the responses of `/v1/responses` are kept in `CORRAL_HOME/responses.db`, and how many."""

    max_age_days: float = Field(30, gt=0, description="a response is deleted so many days after it was created")
    max_gib: float = Field(1, ge=0.001, description="beyond this size of the file, the oldest are deleted")


class ServeArgs(_StrictModel):
    """`args:` of `deployments.app:build_app`."""

    base_model: str = EMBEDDED_MODEL
    base_revision: str | None = None
    quantization: Quantization = Quantization()
    chat_format: str = "auto"
    chat: ChatSettings = Field(ChatSettings(), description="for the base; adapters keep what they were trained with")
    registry: str | None = Field(None, description="any fsspec path; default: CORRAL_HOME/registry")
    engine: EngineArgs = EngineArgs()
    stored_responses: StoredResponsesArgs = StoredResponsesArgs()
    cors_origins: tuple[Annotated[str, Field(pattern=r"^(\*|https?://[^/\s]+)$")], ...] = Field(
        (), description="origins, such as https://example.com, whose web pages may use the API with a key; * for any"
    )


class UIArgs(_StrictModel):
    """`args:` of `deployments.app:build_ui`."""

    api_app: str = Field("corral", description="name of the Serve application with the API")
    title: str = "Corral"


_ARGS_BY_BUILDER: dict[str, type[_StrictModel]] = {
    "deployments.app:build_app": ServeArgs,
    "deployments.app:build_ui": UIArgs,
}
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


def load_serve_config(path: str | Path) -> dict[str, Any]:
    """Read a serve YAML and check all of its keys.

    Raises:
        ServeConfigError: the file is missing, is not YAML, or has a key or value that Ray or Corral does not accept.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ServeConfigError(f"serve config {str(path)!r} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ServeConfigError(f"serve config {str(path)!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ServeConfigError(f"serve config {str(path)!r} is not a mapping: see configs/serve/quickstart.yaml")
    check_serve_config(content, str(path))
    return content


def check_serve_config(content: dict[str, Any], source: str) -> None:
    """Reject keys and values that Ray would drop or that Corral's own arguments do not accept."""
    from ray.serve.schema import ServeDeploySchema

    _check_keys(content, ServeDeploySchema, source, "")
    try:
        schema = ServeDeploySchema.model_validate(content)
        for application in schema.applications:
            args = _ARGS_BY_BUILDER.get(application.import_path)
            if args is not None:
                _check_keys(application.args, args, source, f"applications.{application.name}.args.")
                args.model_validate(application.args)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        raise ServeConfigError(f"{source}: {path}: {first['msg']}, given {first['input']!r}") from error
    _check_https(schema.http_options, source)
    host = schema.http_options.host
    if host not in LOOPBACK_HOSTS and KeyStore().num_valid == 0:
        raise ServeConfigError(
            f"{source}: http_options.host is {host!r}, and anybody who can reach it could use the models, because "
            "there is no valid API key: run 'corral keys create --name NAME', or bind 127.0.0.1"
        )


def _check_https(options: Any, source: str) -> None:
    """Reject HTTPS options that Ray accepts but does not implement, and unusable certificate files."""
    if options.ssl_ca_certs:
        raise ServeConfigError(
            f"{source}: http_options.ssl_ca_certs is {options.ssl_ca_certs!r}, but Ray asks no client for a "
            "certificate: remove it, and give callers API keys"
        )
    if options.ssl_keyfile_password:
        raise ServeConfigError(
            f"{source}: http_options.ssl_keyfile_password does not protect a key that is stored next to it: store the "
            "key unencrypted, with mode 0600"
        )
    if options.ssl_certfile:
        try:
            check_tls_files(options.ssl_certfile, options.ssl_keyfile)
        except ServeConfigError as error:
            raise ServeConfigError(f"{source}: http_options: {error}") from error


def _check_keys(value: Any, model: type[BaseModel], source: str, path: str) -> None:
    """Compare nested mappings with the pydantic models that will validate them, and reject unknown keys."""
    if not isinstance(value, dict):
        return
    for key, child in value.items():
        field = model.model_fields.get(key)
        if field is None:
            suggestions = difflib.get_close_matches(str(key), model.model_fields, n=1)
            hint = (
                f"did you mean {suggestions[0]!r}?"
                if suggestions
                else f"known keys: {', '.join(sorted(model.model_fields))}"
            )
            raise ServeConfigError(f"{source}: unknown key '{path}{key}' (value {child!r}): {hint}")
        for nested in _models_in(field.annotation):
            if isinstance(child, list):
                for i, item in enumerate(child):
                    _check_keys(item, nested, source, f"{path}{key}.{i}.")
            else:
                _check_keys(child, nested, source, f"{path}{key}.")


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models_in(inner)]

"""Serve YAMLs: everything misspelt is refused, also where Ray would drop it without a word."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.config import load_serve_config
from deployments.errors import ServeConfigError

SERVE_CONFIGS = sorted(Path("configs/serve").rglob("*.yaml"))


def variant(tmp_path: Path, change: Any) -> Path:
    content = yaml.safe_load(Path("configs/serve/quickstart.yaml").read_text())
    change(content)
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("path", SERVE_CONFIGS, ids=str)
def test_every_serve_yaml_is_accepted_and_binds_loopback(path: Path) -> None:
    assert load_serve_config(path)["http_options"]["host"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(aplications=[]), "unknown key 'aplications'.*'applications'"),
        (lambda c: c["http_options"].update(prot=1), "unknown key 'http_options.prot'.*'port'"),
        (lambda c: c["applications"][0].update(route=1), "unknown key 'applications.0.route'"),
        (lambda c: c["applications"][0]["args"].update(base_modle="x"), "args.base_modle'.*'base_model'"),
        (
            lambda c: c["applications"][0]["args"]["engine"].update(max_num_seq=1),
            "args.engine.max_num_seq'.*'max_num_seqs'",
        ),
        (lambda c: c["applications"][0]["deployments"][0].update(num_replica=1), "deployments.0.num_replica'"),
        (
            lambda c: c["applications"][0]["deployments"][0]["autoscaling_config"].update(max_replica=3),
            "autoscaling_config.max_replica'.*'max_replicas'",
        ),
        (lambda c: c["applications"][0]["args"]["engine"].update(max_num_seqs=0), "max_num_seqs.*given 0"),
        (lambda c: c["applications"][1]["args"].update(tilte="x"), "args.tilte'.*'title'"),
    ],
)
def test_misspelt_keys_and_bad_values_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(ServeConfigError, match=message):
        load_serve_config(variant(tmp_path, change))


def test_c3_another_host_than_loopback_is_refused_without_keys(tmp_path: Path) -> None:
    with pytest.raises(ServeConfigError, match=r"host is '0.0.0.0'.*bind 127.0.0.1"):
        load_serve_config(variant(tmp_path, lambda c: c["http_options"].update(host="0.0.0.0")))


def test_c3_a_yaml_without_a_host_is_refused_because_ray_would_bind_every_interface(tmp_path: Path) -> None:
    with pytest.raises(ServeConfigError, match=r"host is '0.0.0.0'"):
        load_serve_config(variant(tmp_path, lambda c: c.pop("http_options")))


@pytest.mark.parametrize("text", ["- a\n", "a: [", ""])
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(ServeConfigError):
        load_serve_config(path)

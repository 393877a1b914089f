"""Settings: five layers, every fault at once with its source, and what may be changed from remote."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from neuron.config import FIELDS, MASK, REMOTE, NeuronConfig, Settings, explained, load, updated
from neuron.errors import ConfigError
from neuron_client import APINeuron
from tests.rig.process import ROOT

SECRET = "canary-secret-of-at-least-32-bytes"

# A valid value, as text, that no field has by default.
TEXTS: dict[str, tuple[str, object]] = {
    "neuron_id": ("n-1", "n-1"),
    "name": ("Loom", "Loom"),
    "type": ("weaver", "weaver"),
    "version": ("2.3.4", "2.3.4"),
    "language": ("python3", "python3"),
    "federation_url": ("https://federation.example:5443/base/", "https://federation.example:5443/base"),
    "heartbeat_interval": ("11", 11.0),
    "command_interval": ("12.5", 12.5),
    "analytics_interval": ("13", 13.0),
    "host": ("::1", "::1"),
    "port": ("8181", 8181),
    "state_dir": ("elsewhere", "elsewhere"),
    "log_level": ("debug", "DEBUG"),
    "log_format": ("text", "text"),
    "request_timeout": ("14", 14.0),
    "shutdown_grace": ("15", 15.0),
    "max_concurrent_tasks": ("16", 16),
    "task_timeout": ("17", 17.0),
    "max_body_bytes": ("18", 18),
    "executor": ("processes", "processes"),
    "data_dir": ("/", "/"),
    "capabilities": ("weave, dye", ("weave", "dye")),
    "dependencies": ('["postgres", {"name": "redis", "type": "tcp", "host": "h", "port": 6379}]',
                     ("postgres", {"name": "redis", "type": "tcp", "host": "h", "port": 6379})),
    "api_endpoints": ('["/score"]', ("/score",)),
    "metadata": ('{"site": "north"}', {"site": "north"}),
    "alert_thresholds": ('{"cpu_warning": 70}', {"cpu_warning": 70}),
    "on_identity_conflict": ("new-id", "new-id"),
    "token": ("some-token-text", "some-token-text"),
    "api_secret": (SECRET, SECRET),
}


def faults_of(**sources: Any) -> list[str]:
    sources.setdefault("environ", {})
    with pytest.raises(ConfigError) as caught:
        load(**sources)
    return caught.value.faults


def loaded(environ: Mapping[str, str] | None = None, *assignments: str, file: Path | None = None) -> Settings:
    return load(environ=environ or {}, assignments=assignments, file=None if file is None else str(file))


def config_file(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "neuron.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# -- layers


def test_each_layer_wins_over_the_one_before_it(tmp_path: Path) -> None:
    file = config_file(tmp_path, {"heartbeat_interval": 20, "command_interval": 21, "analytics_interval": 22})
    environ = {"NEURON_COMMAND_INTERVAL": "31", "NEURON_ANALYTICS_INTERVAL": "32"}

    settings = loaded(environ, "analytics_interval=42", file=file)

    config = settings.config
    assert (config.request_timeout, config.heartbeat_interval, config.command_interval, config.analytics_interval) == (
        10, 20, 31, 42,
    )
    assert settings.sources["request_timeout"] == "default"
    assert settings.sources["heartbeat_interval"] == f"file {file}"
    assert settings.sources["command_interval"] == "environment NEURON_COMMAND_INTERVAL"
    assert settings.sources["analytics_interval"] == "--set"
    # The fifth layer, on top of all four.
    assert updated(config, {"analytics_interval": 52}).analytics_interval == 52
    assert updated(config, {"analytics_interval": 52}).command_interval == 31


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_every_field_reads_its_environment_variable(name: str) -> None:
    text, value = TEXTS[name]
    environ = {f"NEURON_{name.upper()}": text}

    settings = loaded(environ)

    assert getattr(settings.config, name) == value
    assert settings.sources[name] == f"environment NEURON_{name.upper()}"
    assert not settings.warnings


TLS = {"tls_ca", "tls_cert", "tls_key"}


@pytest.mark.parametrize("name", sorted(TLS))
def test_tls_files_are_read_from_the_environment(name: str, tmp_path: Path) -> None:
    file = config_file(tmp_path, "pem")
    environ = {"NEURON_FEDERATION_URL": "https://f", "NEURON_TLS_CERT": str(file), "NEURON_TLS_KEY": str(file)}
    environ[f"NEURON_{name.upper()}"] = str(file)
    assert getattr(loaded(environ).config, name) == str(file)


def test_the_table_above_has_every_field() -> None:
    assert set(TEXTS) == set(FIELDS) - TLS
    defaults = NeuronConfig()
    assert not [name for name, (_, value) in TEXTS.items() if getattr(defaults, name) == value]


@pytest.mark.parametrize(
    ("alias", "field", "text", "value"),
    [
        ("FEDERATION_URL", "federation_url", "http://f:1", "http://f:1"),
        ("LOG_LEVEL", "log_level", "warning", "WARNING"),
        ("HEARTBEAT_INTERVAL", "heartbeat_interval", "7", 7.0),
        ("COMMAND_CHECK_INTERVAL", "command_interval", "8", 8.0),
        ("ANALYTICS_INTERVAL", "analytics_interval", "9", 9.0),
    ],
)
def test_an_alias_is_read_and_yields_to_the_proper_name(alias: str, field: str, text: str, value: object) -> None:
    settings = loaded({alias: text})
    assert getattr(settings.config, field) == value
    assert settings.sources[field] == f"environment {alias}"

    proper = f"NEURON_{field.upper()}"
    both = loaded({alias: text, proper: TEXTS[field][0]})
    assert getattr(both.config, field) == TEXTS[field][1]
    assert both.sources[field] == f"environment {proper}"


def test_secrets_are_read_from_files(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(f"{SECRET}\n")
    settings = loaded({"NEURON_API_SECRET_FILE": str(file), "NEURON_TOKEN_FILE": str(file)})
    assert settings.config.api_secret == settings.config.token == SECRET
    assert settings.sources["api_secret"] == "environment NEURON_API_SECRET_FILE"


def test_a_secret_file_that_cannot_be_read_is_a_fault_that_names_it(tmp_path: Path) -> None:
    (fault,) = faults_of(environ={"NEURON_TOKEN_FILE": str(tmp_path / "absent")})
    assert "NEURON_TOKEN_FILE" in fault
    assert str(tmp_path / "absent") in fault
    assert "cannot be read" in fault


@pytest.mark.parametrize("name", ["token", "api_secret"])
def test_a_secret_is_refused_on_the_command_line_which_everybody_can_read(name: str) -> None:
    (fault,) = faults_of(assignments=[f"{name}={SECRET}"])
    assert fault.startswith(f"--set {name}: ")
    assert f"NEURON_{name.upper()}_FILE" in fault
    assert "canary" not in fault


def test_only_secrets_have_a_file_variable() -> None:
    settings = loaded({"NEURON_NAME_FILE": "/etc/hostname"})
    assert settings.config.name == "api-neuron"
    assert "NEURON_NAME_FILE" in settings.warnings[0]


# -- faults


def test_one_error_names_every_fault_with_its_source_and_the_nearest_name(tmp_path: Path) -> None:
    file = config_file(tmp_path, {"heartbeat_intervall": 5, "port": "8080", "log_level": "INFOO"})
    faults = faults_of(
        file=str(file),
        environ={"NEURON_HEARTBEAT_INTERVAL": "soon", "NEURON_FEDERATION_URL": "localhost:5000"},
        assignments=["max_body_bites=3", "request_timeout=-1", "log_format"],
    )

    def fault(*parts: str) -> bool:
        return any(all(part in fault for part in parts) for fault in faults)

    assert fault(f"file {file}", "unknown setting 'heartbeat_intervall'", "did you mean heartbeat_interval?")
    assert fault(f"file {file}", "port", "'8080' is not a number")
    assert fault(f"file {file}", "log_level", "'INFOO'", "did you mean INFO?")
    assert fault("environment NEURON_HEARTBEAT_INTERVAL", "'soon' is not a number")
    assert fault("environment NEURON_FEDERATION_URL", "'localhost:5000' is not an http")
    assert fault("--set max_body_bites", "unknown setting", "did you mean max_body_bytes?")
    assert fault("--set", "request_timeout", "-1.0 is not between 0.1 and 120")
    assert fault("--set log_format", "field=value")
    assert len(faults) == 8


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"name": ""}, "is empty"),
        ({"name": "x" * 256}, "over the federation's 255"),
        ({"name": "a\nb"}, "control characters"),
        ({"name": 5}, "5 is not text"),
        ({"neuron_id": "a b"}, "letters, digits"),
        ({"neuron_id": "x" * 101}, "over the federation's 100"),
        ({"federation_url": "ftp://f"}, "not an http:// or https://"),
        ({"federation_url": "http://f:port"}, "not a URL"),
        ({"federation_url": "http://u:p@f"}, "user name or password"),
        ({"federation_url": "http://f/?a=b"}, "query or fragment"),
        ({"heartbeat_interval": 0}, "not between"),
        ({"heartbeat_interval": float("nan")}, "not a finite number"),
        ({"heartbeat_interval": True}, "True is not a number"),
        ({"port": 70_000}, "not between 0 and 65535"),
        ({"port": 80.5}, "not a whole number"),
        ({"state_dir": ""}, "name a directory"),
        ({"capabilities": "weave"}, "not a list"),
        ({"capabilities": [1]}, "not a list of texts"),
        ({"dependencies": [{"name": "db", "type": "tpc", "host": "h", "port": 1}]}, "'tpc'"),
        ({"metadata": []}, "not an object"),
        ({"metadata": {"a": float("inf")}}, "is not JSON"),
        ({"alert_thresholds": {"cpu_warnin": 70}}, "cpu_warning"),
        ({"on_identity_conflict": "newid"}, "did you mean new-id?"),
        ({"api_secret": "short"}, "shorter than 32 bytes"),
        ({"tls_cert": "/etc/passwd", "federation_url": "https://f"}, "both or neither"),
        ({"tls_ca": "/no/such/file", "federation_url": "https://f"}, "there is no file /no/such/file"),
        ({"tls_ca": "/etc/passwd"}, "federation_url is not https"),
        ({"data_dir": "/no/such/directory"}, "no directory"),
        ({"executor": "thread"}, "did you mean threads?"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_by_name(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        NeuronConfig(**setting)
    (fault,) = caught.value.faults
    assert next(iter(setting)) in fault
    assert words in fault


def test_a_fault_between_two_fields_names_its_source() -> None:
    (fault,) = faults_of(environ={"NEURON_DATA_DIR": "/no/such/directory"})
    assert fault.startswith("environment NEURON_DATA_DIR: data_dir: ")


def test_a_secret_of_a_wrong_kind_is_not_repeated_in_the_fault() -> None:
    (fault,) = faults_of(environ={"NEURON_TOKEN": "canary\ntoken"})
    assert "control characters" in fault
    assert "canary" not in fault
    with pytest.raises(ConfigError) as caught:
        NeuronConfig(api_secret=["canary"])  # type: ignore[arg-type]
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds a list, not an object"),
        ("null", "holds null"),
        ("true", "holds a boolean"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_file_that_is_no_object_of_settings_is_refused(content: str, words: str, tmp_path: Path) -> None:
    file = config_file(tmp_path, content)
    (fault,) = faults_of(file=str(file))
    assert fault.startswith(f"file {file}: ")
    assert words in fault


def test_a_file_that_is_missing_or_not_text_is_refused(tmp_path: Path) -> None:
    (fault,) = faults_of(file=str(tmp_path / "absent.json"))
    assert "absent.json: cannot be read: No such file" in fault
    (tmp_path / "latin.json").write_bytes(b'{"name": "\xe9"}')
    (fault,) = faults_of(file=str(tmp_path / "latin.json"))
    assert "latin.json: is not JSON" in fault


def test_an_unknown_variable_is_a_warning_with_the_nearest_name() -> None:
    settings = loaded({"NEURON_HEARTBEAT_INTERVALL": "5"})
    (warning,) = settings.warnings
    assert "NEURON_HEARTBEAT_INTERVALL" in warning
    assert "did you mean NEURON_HEARTBEAT_INTERVAL?" in warning
    assert settings.config == NeuronConfig()


def test_what_kubernetes_sets_for_a_service_called_neuron_is_told_in_so_many_words() -> None:
    settings = loaded(
        {
            "NEURON_PORT": "tcp://10.0.0.7:8080",
            "NEURON_SERVICE_HOST": "10.0.0.7",
            "NEURON_SERVICE_PORT": "8080",
            "NEURON_SERVICE_PORT_HTTP": "8080",
            "NEURON_PORT_8080_TCP_ADDR": "10.0.0.7",
            "NEURON_PORT_8080_TCP": "tcp://10.0.0.7:8080",
        }
    )
    assert settings.config.port == 8080
    assert settings.sources["port"] == "default"
    (warning,) = settings.warnings
    for words in ("Kubernetes", "NEURON_PORT", "NEURON_SERVICE_HOST", "enableServiceLinks: false", "--set port="):
        assert words in warning


def test_a_port_that_is_a_number_is_the_operators_own() -> None:
    assert loaded({"NEURON_PORT": "9090"}).config.port == 9090
    assert "NEURON_PORT" in faults_of(environ={"NEURON_PORT": "ninety"})[0]


# -- the program


def run_program(*arguments: str, tmp_path: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NEURON_")}
    return subprocess.run(
        [sys.executable, str(ROOT / "neuron_client.py"), *arguments],
        env={**clean, **environ}, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False,
    )


def test_bad_settings_end_the_program_with_exit_code_2_and_every_fault(tmp_path: Path) -> None:
    ended = run_program("--set", "prot=1", tmp_path=tmp_path, NEURON_PORT="ninety", LOG_LEVEL="loud")
    assert ended.returncode == 2
    for words in ("--set prot", "did you mean port?", "NEURON_PORT", "environment LOG_LEVEL", "DEBUG, INFO"):
        assert words in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not ended.stdout
    assert not list(tmp_path.iterdir()), "nothing is created before the settings are known"


def test_print_config_shows_value_and_source_with_secrets_masked(tmp_path: Path) -> None:
    ended = run_program(
        "--print-config", "--set", "port=8181", tmp_path=tmp_path,
        NEURON_API_SECRET=SECRET, NEURON_TOKEN="canary-token", NEURON_SERVICE_HOST="10.0.0.7",
    )
    assert ended.returncode == 0
    lines = {line.split(" = ")[0].strip(): line.split(" = ")[1] for line in ended.stdout.splitlines()}
    assert set(lines) == set(FIELDS)
    assert lines["port"] == "8181   # --set"
    assert lines["token"] == f'"{MASK}"   # environment NEURON_TOKEN'
    assert lines["api_secret"] == f'"{MASK}"   # environment NEURON_API_SECRET'
    assert lines["name"] == '"api-neuron"   # default'
    assert "canary" not in ended.stdout + ended.stderr
    assert not list(tmp_path.iterdir())


def test_the_shipped_example_loads_as_it_is() -> None:
    example = ROOT / "config.example.json"
    settings = loaded(file=example)
    named = json.loads(example.read_text())
    assert named, "an example without settings shows nothing"
    assert all(settings.sources[name] == f"file {example}" for name in named)


# -- frozen, masked, told apart


def test_a_config_cannot_be_changed() -> None:
    config = NeuronConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.port = 1  # type: ignore[misc]


def test_a_callers_later_change_to_its_dict_does_not_reach_the_config() -> None:
    metadata = {"site": "north"}
    config = NeuronConfig(metadata=metadata)
    metadata["site"] = "south"
    assert config.metadata == {"site": "north"}
    assert NeuronConfig().metadata is not NeuronConfig().metadata


def test_no_secret_is_in_a_configs_repr_or_public_form() -> None:
    config = NeuronConfig(token="canary-token", api_secret=SECRET)
    shown = repr(config) + json.dumps(config.public()) + explained(Settings(config, dict.fromkeys(FIELDS, "x"), []))
    assert "canary" not in shown
    assert config.public()["token"] == MASK
    assert NeuronConfig().public()["token"] == ""


def test_the_digest_changes_with_settings_and_not_with_secrets() -> None:
    digest = NeuronConfig().digest()
    assert NeuronConfig(token="another-token").digest() == digest
    assert len({digest, NeuronConfig(port=1).digest(), NeuronConfig(metadata={"a": 1}).digest()}) == 3
    assert len(digest) <= 50, "the federation's limit for configVersion"


# -- config_update


def test_a_remote_update_is_all_or_nothing_and_names_every_fault() -> None:
    config = NeuronConfig()
    with pytest.raises(ConfigError) as caught:
        updated(config, {"heartbeat_interval": 30, "heartbeat_intervall": 5, "log_level": "LOUD", "port": 1})
    faults = caught.value.faults
    assert len(faults) == 3
    assert any("did you mean heartbeat_interval?" in fault for fault in faults)
    assert config.heartbeat_interval == 60
    assert updated(config, {"heartbeat_interval": 30}).heartbeat_interval == 30
    assert config.heartbeat_interval == 60


@pytest.mark.parametrize("name", sorted(set(FIELDS) - set(REMOTE)))
def test_identity_addresses_secrets_tls_and_paths_are_refused_from_remote(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: is not changed from remote"):
        updated(NeuronConfig(), {name: TEXTS.get(name, ("x",))[0]})


def test_what_may_be_changed_from_remote_is_this_and_no_more() -> None:
    assert set(REMOTE) == {
        "heartbeat_interval", "command_interval", "analytics_interval", "log_level", "log_format", "request_timeout",
        "shutdown_grace", "max_concurrent_tasks", "task_timeout", "max_body_bytes", "alert_thresholds",
    }


@pytest.mark.parametrize("name", ["heartbeat_interval", "command_interval", "analytics_interval"])
@pytest.mark.parametrize("value", ["60", 0, -1, 1e9, 0.5, True, None, [60], float("nan")])
def test_an_interval_from_remote_is_a_number_from_one_second_to_a_day(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        updated(NeuronConfig(), {name: value})


def test_a_remote_value_is_never_read_as_text() -> None:
    for name, value in {"max_concurrent_tasks": "4", "max_body_bytes": "1", "alert_thresholds": "{}"}.items():
        with pytest.raises(ConfigError, match=name):
            updated(NeuronConfig(), {name: value})


def test_a_neuron_made_without_a_config_has_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    neuron = APINeuron()
    assert neuron.config == NeuronConfig()
    assert not list(tmp_path.iterdir()), "making one touches nothing"

"""The documents do what they say: their blocks are run as a reader would, in an empty directory.

A block's first line names what becomes of it: `bash` is run, `bash background` is left running, `bash until WORD` is
repeated until WORD shows, a language with a file name is that file (or, for neuron_client.py, goes above its
`return neuron`). `bash install` alone is not run: it makes the virtual environment that the tests run in already.
"""

from __future__ import annotations

import importlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.rig.process import ROOT, wait_for

pytestmark = pytest.mark.slow

BLOCK = re.compile(r"^```(\w+)(?: ([^\n]+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(document: str) -> Iterator[tuple[str, str, str]]:
    """`(language, label, text)` of each fenced block."""
    for match in BLOCK.finditer((ROOT / "docs" / document).read_text(encoding="utf-8")):
        yield match[1], match[2] or "", match[3]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Reader:
    """Somebody with a terminal in an empty directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.background: list[subprocess.Popen[bytes]] = []
        # Their own ports: 5000 and 8080 may be somebody else's where the tests run.
        self._ports = {"5000": free_port(), "8080": free_port()}
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("NEURON_", "PYTHONPATH"))}
        self._environ = {
            **clean, "PROJECT": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def with_ports(self, text: str) -> str:
        return re.sub(r"\b(5000|8080)\b", lambda match: self._ports[match[1]], text)

    def run(self, text: str) -> str:
        """The output of a block; the directory it ends in is the next one's."""
        ended_in = self.directory / ".ended-in"
        script = f"set -e -o pipefail\n{self.with_ports(text)}\npwd > '{ended_in}'"
        done = subprocess.run(
            ["bash", "-c", script], cwd=self.directory, env=self._environ, capture_output=True, text=True, timeout=100,
            check=False,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        self.directory = Path(ended_in.read_text().strip())
        ended_in.unlink()
        return done.stdout

    def run_until(self, word: str, text: str) -> None:
        wait_for(lambda: word in self.run(text), 15, word)

    def start(self, text: str) -> None:
        log = (self.directory / f"background-{len(self.background)}.log").open("wb")
        with log:
            self.background.append(subprocess.Popen(
                ["bash", "-c", f"exec {self.with_ports(text)}"], cwd=self.directory, env=self._environ, stdout=log,
                stderr=subprocess.STDOUT,
            ))

    def write(self, name: str, text: str) -> None:
        file = self.directory / name
        text = self.with_ports(text)
        if file.exists():
            before, found, after = file.read_text(encoding="utf-8").rpartition("\n    return neuron\n")
            assert found
            text = f"{before}\n{text}{found}{after}"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")

    def ready(self) -> bool:
        try:
            url = self.with_ports("http://127.0.0.1:8080/health/ready")
            return requests.get(url, timeout=2).status_code == 200
        except requests.ConnectionError:
            return False


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    someone = Reader(tmp_path)
    yield someone
    for process in reversed(someone.background):
        process.terminate()
        assert process.wait(15) == 0


def test_adapt_leads_from_an_empty_directory_to_a_neuron_of_ones_own(reader: Reader) -> None:
    output = ""
    for language, label, text in blocks("adapt.md"):
        if label == "install":
            continue
        if language != "bash":
            reader.write(label, text)
        elif label == "background":
            reader.start(text)
        elif label.startswith("until "):
            reader.run_until(label.removeprefix("until "), text)
        else:
            if reader.background:
                wait_for(reader.ready, 15, "the neuron")
            output += reader.run(text)
    assert "1 passed" in output
    assert '"total": 10.0' in output
    assert 'federation_url       = "https://federation.example"   # environment' in output


def test_every_link_of_the_documents_leads_somewhere() -> None:
    for document in (ROOT / "docs").glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_tls_variables_of_the_executors_page_are_those_dask_reads() -> None:
    dask, distributed = importlib.import_module("dask"), importlib.import_module("distributed")
    (lines,) = [text for _, _, text in blocks("executors.md") if "TLS__CA_FILE" in text]
    environ = dict(line.removeprefix("export ").split("=") for line in lines.splitlines())
    settings = dask.config.collect_env(environ)
    with dask.config.set(dask.config.merge(dask.config.config, settings)):
        security = distributed.Security()
    assert (security.tls_ca_file, security.require_encryption) == ("/etc/dask/ca.pem", True)
    assert (security.tls_client_cert, security.tls_client_key) == ("/etc/dask/neuron.pem", "/etc/dask/neuron.key")

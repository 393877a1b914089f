"""The tasks every neuron has. They run in its own process, whatever the executor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from neuron.config import NeuronConfig
from neuron.data_profile import BadData, UnsupportedType, read_records
from neuron.errors import Rejected
from neuron.journal import Journal
from neuron.tasks import TaskContext, TaskRegistry


class Neuron(Protocol):
    """What these tasks need; APINeuron is one."""

    config: NeuronConfig
    tasks: TaskRegistry
    journal: Journal

    def process_data(self, data: Any) -> Any: ...
    def day_report(self) -> dict[str, Any]: ...


def add_builtin_tasks(neuron: Neuron) -> None:
    """Register data_processing, batch_processing, report_generation and cleanup."""

    def process(records: list[Any] | None, file: str | None, where: str) -> Any:
        if (records is None) == (file is None):
            raise Rejected(f"{where} wants either `records`, a list, or `file`, a name below data_dir")
        try:
            return neuron.process_data(records if file is None else read_records(_allowed(neuron.config, file)))
        except (BadData, UnsupportedType) as error:
            raise Rejected(f"{where}: {error}") from None

    def data_processing(records: list[Any] | None = None, file: str | None = None) -> Any:
        """The processor of /data/process over `records` or a file."""
        return process(records, file, "data_processing")

    def batch_processing(batches: list[dict[str, Any]], context: TaskContext) -> Any:
        """The same over many: each batch has `records` or `file`."""
        results: list[Any] = []
        for number, batch in enumerate(batches):
            context.check_cancelled()
            if unknown := set(batch) - {"records", "file"}:
                raise Rejected(f"batches[{number}]: unknown {', '.join(sorted(unknown))}; give `records` or `file`")
            results.append(process(batch.get("records"), batch.get("file"), f"batches[{number}]"))
            context.progress((number + 1) / len(batches), f"batch {number + 1}/{len(batches)}")
        return {"batches": results}

    def report_generation() -> Any:
        """The neuron's own day, as data and as Markdown."""
        report = neuron.day_report()
        lines = [f"# {neuron.config.name} on {report['date']}", "", "| figure | value |", "| --- | --- |"]
        lines += [f"| {name} | {value} |" for name, value in report.items() if isinstance(value, int)]
        return {"report": report, "markdown": "\n".join(lines) + "\n"}

    def cleanup() -> Any:
        """Forget old journal rows and files set aside; says what that freed."""
        freed = neuron.journal.compact()
        return {"removedRows": freed["rows"], "removedFiles": freed["files"], "freedBytes": freed["bytes"]}

    functions: Sequence[Any] = (data_processing, batch_processing, report_generation, cleanup)
    for function in functions:
        neuron.tasks.add(function.__name__, function, idempotent=True, builtin=True)


def _allowed(config: NeuronConfig, name: str) -> Path:
    """The file of that name in `data_dir`. Raises Rejected for any other, wherever `..` or a link leads."""
    if not config.data_dir:
        raise Rejected("files are not read here: data_dir is not set")
    root = Path(config.data_dir).resolve()
    try:
        path = (root / name).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        raise Rejected(f"there is no file {name!r} in data_dir") from None
    if not path.is_relative_to(root) or not path.is_file():
        raise Rejected(f"there is no file {name!r} in data_dir")
    return path

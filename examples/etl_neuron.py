"""CSV in, SQLite out: python -m examples.etl_neuron --local --set data_dir=data

    run_task {"task": "load_orders", "params": {"file": "orders.csv"}}

reads data/orders.csv (order_id,customer,amount) into data/orders.db. An order's id is its key, so a run that died
half-way is run again from the start and leaves each order once.
"""

from __future__ import annotations

import csv
import sqlite3
from contextlib import closing
from decimal import Decimal, InvalidOperation
from itertools import islice
from pathlib import Path

from neuron.program import run
from neuron_client import APINeuron, NeuronConfig, Rejected, TaskContext

ROWS_AT_ONCE = 1000
COLUMNS = ["order_id", "customer", "amount"]


def opened(database: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(database)
    connection.execute("CREATE TABLE IF NOT EXISTS orders (order_id TEXT PRIMARY KEY, customer TEXT, cents INTEGER)")
    return connection


def cents(row: dict[str, str]) -> tuple[str, str, int]:
    return row["order_id"], row["customer"].strip(), int(Decimal(row["amount"]) * 100)


def load(source: Path, database: Path, context: TaskContext) -> dict[str, int]:
    """Load every order of `source`; a row that is none is counted and left out."""
    loaded = skipped = 0
    with source.open(newline="", encoding="utf-8") as file, closing(opened(database)) as connection:
        total = sum(1 for _ in file) - 1
        file.seek(0)
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise Rejected(f"{source.name}: its columns are {reader.fieldnames}, not {COLUMNS}")
        while rows := list(islice(reader, ROWS_AT_ONCE)):
            context.check_cancelled()
            orders = []
            for row in rows:
                try:
                    orders.append(cents(row))
                except (InvalidOperation, TypeError, AttributeError) as error:
                    skipped += 1
                    context.logger.warning("%s: order %s left out: %r", source.name, row["order_id"], error)
            with connection:  # one transaction: a batch is there, or not
                connection.executemany("INSERT OR REPLACE INTO orders VALUES (?, ?, ?)", orders)
            loaded += len(orders)
            context.progress((loaded + skipped) / total, f"rows {loaded + skipped}/{total}")
    return {"loaded": loaded, "skipped": skipped}


def build(config: NeuronConfig) -> APINeuron:
    data = Path(config.data_dir or ".")
    neuron = APINeuron(config)

    @neuron.task("load_orders", idempotent=True, timeout=3600)
    def load_orders(file: str, context: TaskContext) -> dict[str, int]:
        source = data / file
        if Path(file).name != file or not source.is_file():
            raise Rejected(f"there is no file {file!r} in {data}")
        result = load(source, data / "orders.db", context)
        neuron.metric("orders_loaded").add(result["loaded"])
        neuron.event("orders_loaded", file=file, **result)
        return result

    @neuron.dependency("orders_database", every=60)
    def orders_database() -> str:
        with closing(opened(data / "orders.db")) as connection:
            return f"{connection.execute('SELECT count(*) FROM orders').fetchone()[0]} orders"

    return neuron


if __name__ == "__main__":
    raise SystemExit(run(build))

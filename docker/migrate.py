"""Make the databases that are missing, and bring each to the schema of the Optuna and MLflow that are installed here.

Does nothing where nothing is to do. A database that a newer version has written is refused, with exit code 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from optuna.storages import RDBStorage
from sqlalchemy import create_engine, make_url, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optuna", metavar="URL", required=True, help="the database of Optuna's storage")
    parser.add_argument("--mlflow", metavar="URL", action="append", default=[], help="one of a server; repeatable")
    stores = parser.parse_args()
    for url in (stores.optuna, *stores.mlflow):
        create(url)
    # the check is of the version, which is what is to be changed
    RDBStorage(stores.optuna, skip_compatibility_check=True).upgrade()
    for url in stores.mlflow:
        subprocess.run([sys.executable, "-m", "mlflow", "db", "upgrade", url], check=True)


def create(url: str) -> None:
    """Create a PostgreSQL database, unless it is there."""
    wanted = make_url(url)
    engine = create_engine(wanted.set(database="postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        names = connection.scalars(text("SELECT datname FROM pg_database"))
        if wanted.database not in names.all():
            connection.execute(text(f'CREATE DATABASE "{wanted.database}"'))
            print(f"made database {wanted.database}", flush=True)


if __name__ == "__main__":
    main()

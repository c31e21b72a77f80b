"""The compose file: what it promises, and its services' commands, started as processes that run a study together."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from postgres import Server, free_port, needs_postgres, server
from ruamel.yaml import YAML

from workbench.tracking import frames

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docker-compose.yml"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
ONE_SHOT = "migrate"

STUDY = """\
study: small
model:
  path: assets/minilm-l3-8k
  task: SEQ_CLS
  weights: random
  overrides: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}
data:
  path: assets/movie_sentiment
  text: text
  label: label
  max_rows: {train: 60, validation: 20}
training: {steps: 4, batch_size: 4, eval_every: 2, device: cpu}
methods:
  lora:
    r: {values: [2, 4]}
  ia3:
budget: {trials: 3}
search: {sampler: grid, pruner: none}
"""


def compose(**variables: str) -> dict[str, Any]:
    """The compose file, as compose reads it with these variables in the shell."""
    text = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: variables.get(match[1]) or match[2], FILE.read_text())
    assert "${" not in text, "a form of variable that is not replaced here"
    return YAML(typ="safe").load(text)


SERVICES = compose()["services"]


def instruction(name: str) -> str:
    """The arguments of an instruction that the Dockerfile has once."""
    (found,) = re.findall(rf"^{name} (.+)$", DOCKERFILE, re.MULTILINE)
    return found


# what the file says


def test_the_file_follows_the_compose_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(FILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_images_are_of_one_version() -> None:
    assert {service["image"] for service in SERVICES.values()} == {"postgres:18.4-bookworm", "workbench:local"}
    # by one service that all others need: builds of one image at the same time fail when they export it
    assert [service["image"] for service in SERVICES.values() if "build" in service] == ["workbench:local"]
    assert "build" in SERVICES[ONE_SHOT]
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-bookworm", instruction("FROM"))
    installs = re.findall(r"\bpip install .*", DOCKERFILE)
    assert installs == ["pip install -c constraints.txt '.[server]'"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_few_rights_and_no_port_on_other_addresses(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["init"] is True
    user = instruction("USER") if service["image"] == "workbench:local" else service["user"]
    assert user in ("workbench", "postgres")
    assert service.get("user", user) == user
    assert "privileged" not in service
    assert "cap_add" not in service
    for port in service.get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)


@pytest.mark.parametrize("name", [name for name in SERVICES if name != ONE_SHOT])
def test_a_service_says_whether_it_is_well(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"


def test_all_others_wait_for_the_migration() -> None:
    def waits_for(name: str) -> set[str]:
        found = SERVICES[name].get("depends_on", {})
        return set(found).union(*map(waits_for, found))

    for name in set(SERVICES) - {ONE_SHOT, "postgres"}:
        assert ONE_SHOT in waits_for(name), name
    conditions = [how[ONE_SHOT]["condition"] for s in SERVICES.values() if ONE_SHOT in (how := s.get("depends_on", {}))]
    assert set(conditions) == {"service_completed_successfully"}


def test_what_is_opt_in() -> None:
    profiles = {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service}
    assert profiles == {"mlflow-s3": ["s3"], "worker-cpu": ["cpu"], "worker-gpu": ["gpu"]}
    for name, service in SERVICES.items():
        optional = {other for other, how in service.get("depends_on", {}).items() if not how.get("required", True)}
        assert optional == set(service.get("depends_on", {})) & set(profiles), name


def test_the_workers_differ_in_the_gpu_alone() -> None:
    cpu, gpu = SERVICES["worker-cpu"], SERVICES["worker-gpu"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    different = {key for key in cpu.keys() | gpu.keys() if cpu.get(key) != gpu.get(key)}
    assert different == {"profiles", "deploy"}
    program, word, study = cpu["command"]
    assert (program, word) == ("workbench", "worker")
    assert (ROOT / study.lstrip("/")).is_file()


def test_all_services_use_one_storage_of_optuna() -> None:
    storage = SERVICES["worker-cpu"]["environment"]["WORKBENCH_STORAGE"]
    assert SERVICES["dashboard"]["environment"]["WORKBENCH_OPTUNA_URL"] == storage
    assert SERVICES["optuna-dashboard"]["command"][-1] == storage
    assert f"--optuna={storage}" in SERVICES["migrate"]["command"]


def test_every_database_is_made_by_the_migration() -> None:
    made = {word.partition("=")[2] for word in SERVICES["migrate"]["command"] if word.startswith("--mlflow=")}
    stores = {name: word for name, s in SERVICES.items() for word in s.get("command", []) if "backend-store" in word}
    assert set(stores) == {"mlflow", "mlflow-s3"}
    assert {word.partition("=")[2] for word in stores.values()} == made


def test_volumes_are_declared_and_hold_what_must_last() -> None:
    named = [volume for service in SERVICES.values() for volume in service.get("volumes", []) if volume[0] not in "./"]
    assert {volume.partition(":")[0] for volume in named} == set(compose()["volumes"])
    # where the image of PostgreSQL 18 keeps its cluster; a mount elsewhere would not outlive the container
    assert SERVICES["postgres"]["volumes"] == ["postgres:/var/lib/postgresql"]


def test_secrets_are_files_that_neither_git_nor_the_image_gets() -> None:
    for secret in compose()["secrets"].values():
        assert secret["file"].startswith("./secrets/")
    assert "/secrets/" in (ROOT / ".gitignore").read_text().splitlines()
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert rules[0] == "*"
    copied = {word for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE) for word in line.split()}
    assert {rule.removeprefix("!/") for rule in rules if rule.startswith("!")} == copied


@pytest.mark.parametrize("name", SERVICES)
def test_a_secret_is_named_by_its_file_only(name: str) -> None:
    service = SERVICES[name]
    files = {value for key, value in service.get("environment", {}).items() if key.endswith("_FILE")}
    assert files == {f"/run/secrets/{secret}" for secret in service.get("secrets", [])}
    words = [*service.get("command", []), *filter(None, service.get("environment", {}).values())]
    for url in (word for word in words if "://" in word):
        assert re.fullmatch(r"[^@]*://[^:@/]+(@|:\d+$|$).*", url), f"{url} has a password"


# the entry point


def entrypoint(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "docker" / "entrypoint.sh"), *words]
    return subprocess.run(
        command, env={"PATH": os.environ["PATH"], **environment}, capture_output=True, text=True, check=False
    )


def test_the_entry_point_reads_the_password_and_becomes_the_command(tmp_path: Path) -> None:
    (tmp_path / "a secret").write_text("pass word\n")
    done = entrypoint("sh", "-c", 'echo "$PGPASSWORD|$1"; exit 7', "-", "x  y", PGPASSWORD_FILE=f"{tmp_path}/a secret")
    assert (done.returncode, done.stdout, done.stderr) == (7, "pass word|x  y\n", "")
    assert entrypoint("sh", "-c", 'echo "${PGPASSWORD-none}"').stdout == "none\n"


def test_the_entry_point_starts_nothing_without_the_password(tmp_path: Path) -> None:
    done = entrypoint("echo", "started", PGPASSWORD_FILE=f"{tmp_path}/missing")
    assert done.returncode != 0
    assert done.stdout == ""
    assert "missing" in done.stderr


# the services as processes


class Stack:
    """The services as processes: entry point, commands, environment, secrets, volumes and health checks are those of
    the file, with free ports of 127.0.0.1 in place of its host names, and folders in place of its mounts."""

    def __init__(self, folder: Path, database: Server, **variables: str):
        self.folder, self.database = folder, database
        self.file = compose(**variables)
        self.services = self.file["services"]
        self.ports = {name: free_port() for name, service in self.services.items() if "ports" in service}
        self.ports["postgres"] = database.port
        self.processes: dict[str, list[subprocess.Popen[bytes]]] = {"postgres": []}
        for name in ("bin", "home", "logs", "secrets"):
            (folder / name).mkdir()
        (folder / "secrets" / "postgres_password").write_text(database.password + "\n")
        command = folder / "bin" / "workbench"  # which is not installed where tests run from a checkout
        command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m workbench "$@"\n')
        command.chmod(0o755)

    def url(self, name: str) -> str:
        """Where a service answers."""
        return f"http://127.0.0.1:{self.ports[name]}"

    def here(self, name: str, text: str) -> str:
        """What a text of a service's, such as a word of its command, is outside its container."""
        service = self.services[name]
        places = {"/data": str(self.folder / "containers" / name), "/app": str(ROOT)}
        places |= {f"/run/secrets/{secret}": str(self.folder / "secrets" / secret) for secret in self.file["secrets"]}
        for volume in service.get("volumes", []):
            source, target = volume.split(":")[:2]
            places[target] = source if source.startswith("/") else str(self.folder / "volumes" / source)
        for there, place in places.items():
            text = re.sub(rf"(?<![\w/]){re.escape(there)}(?=/|$)", place, text)
        for other, port in self.ports.items():
            text = text.replace(f"http://{other}:5000", f"http://127.0.0.1:{port}")
            text = text.replace(f"@{other}/", f"@127.0.0.1:{port}/")
        if name in self.ports:
            inside = "|".join(service["ports"][0].split(":")[1:]) if "ports" in service else "5432"
            text = re.sub(rf"(?<=[:=])({inside})\b", str(self.ports[name]), text)
        return text.replace("0.0.0.0", "127.0.0.1")

    def environment(self, name: str) -> dict[str, str]:
        """What a process of a service has in its environment: nothing of this process's."""
        image = dict(pair.split("=", 1) for pair in instruction("ENV").split())
        own = {key: value for key, value in self.services[name].get("environment", {}).items() if value is not None}
        programs = (self.folder / "bin", Path(sys.executable).parent, self.database.bin, "/usr/bin", "/bin")
        return {
            "PATH": ":".join(map(str, programs)),
            "HOME": str(self.folder / "home"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            **{key: self.here(name, value) for key, value in (image | own).items()},
        }

    def start(self, name: str, count: int = 1) -> None:
        """Start processes of a service after what they depend on."""
        for other, how in self.services[name].get("depends_on", {}).items():
            if not how.get("required", True):
                continue
            if other not in self.processes:
                self.start(other)
            if how["condition"] == "service_healthy":
                self.wait_until_healthy(other)
            else:
                self.wait_until_done(other)
        words = [self.here(name, word) for word in json.loads(instruction("ENTRYPOINT"))]
        words += [self.here(name, word) for word in self.services[name]["command"]]
        (self.folder / "containers" / name).mkdir(parents=True, exist_ok=True)
        environment, cwd = self.environment(name), self.folder / "containers" / name
        with (self.folder / "logs" / f"{name}.log").open("ab") as log:
            started = [subprocess.Popen(words, env=environment, cwd=cwd, stdout=log, stderr=log) for _ in range(count)]
        self.processes.setdefault(name, []).extend(started)

    def wait_until_healthy(self, name: str) -> None:
        """Wait until the service's own health check succeeds."""
        _, *test = (self.here(name, word) for word in self.services[name]["healthcheck"]["test"])
        while subprocess.run(test, env=self.environment(name), capture_output=True, check=False).returncode:
            for process in self.processes[name]:
                assert process.poll() is None, f"{name} ended: {self.log(name)}"
            time.sleep(0.5)  # a check is a program that takes time from what starts

    def wait_until_done(self, name: str) -> None:
        """Wait until all processes of the service have ended well."""
        assert [process.wait() for process in self.processes[name]] == [0] * len(self.processes[name]), self.log(name)

    def log(self, name: str) -> str:
        """What the processes of a service said."""
        return (self.folder / "logs" / f"{name}.log").read_text()

    def stop(self) -> None:
        """End what still runs."""
        for process in (process for processes in self.processes.values() for process in processes):
            process.terminate()
            process.wait()


@contextmanager
def stack(folder: Path, **variables: str) -> Iterator[Stack]:
    """Services that can be started, on a PostgreSQL that runs."""
    with server(folder) as database:
        made = Stack(folder, database, **variables)
        try:
            yield made
        finally:
            made.stop()


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Services that can be started, with databases that the migration has made: it takes as long as a study."""
    folder = tmp_path_factory.mktemp("services")
    (folder / "studies").mkdir()
    (folder / "studies" / "small.yaml").write_text(STUDY)
    (folder / "studies" / "assets").symlink_to(ROOT / "studies" / "assets")
    with stack(folder, STUDY="small.yaml", STUDIES=str(folder / "studies")) as made:
        made.start("migrate")
        made.wait_until_done("migrate")
        yield made


def status(url: str, host: str) -> int:
    """The HTTP status with which a URL answers one who calls it by this name."""
    try:
        with urlopen(Request(url, headers={"Host": host})) as answer:
            return answer.status
    except HTTPError as error:
        return error.code


@needs_postgres
@pytest.mark.slow
def test_the_services_run_a_study_together(services: Stack) -> None:
    services.start("worker-cpu", count=2)
    for name in ("dashboard", "optuna-dashboard"):
        services.start(name)
        services.wait_until_healthy(name)
    services.wait_until_done("worker-cpu")

    tracking, database = services.url("mlflow"), services.database
    trials = frames.trials(tracking, "small")
    assert list(trials["outcome"]) == ["complete"] * 3
    assert database.psql("SELECT state, count(*) FROM trials GROUP BY state", "optuna") == "COMPLETE|3"
    for run in trials["run_id"]:
        assert database.psql(f"SELECT status FROM runs WHERE run_uuid = '{run}'", "mlflow") == "FINISHED"
        (adapter,) = (services.folder / "volumes" / "mlflow").glob(f"artifacts/*/{run}/**/adapter_model.safetensors")
        assert adapter.stat().st_size
    with urlopen(services.url("optuna-dashboard") + "/api/studies") as answer:
        assert [study["study_name"] for study in json.load(answer)["study_summaries"]] == ["small"]

    # MLflow answers those that call it by its name, and no page that lets a name of its own point to 127.0.0.1
    api, port = tracking + "/api/2.0/mlflow/experiments/get?experiment_id=0", services.ports["mlflow"]
    assert [status(api, f"{host}:{port}") for host in ("mlflow", "localhost", "127.0.0.1")] == [200] * 3
    assert status(api, f"elsewhere.example:{port}") == 403

    services.stop()
    dumps = [dump(database, name) for name in ("optuna", "mlflow")]
    assert all(b"small" in text for text in dumps)
    files = [path for path in services.folder.rglob("*") if path.is_file() and "secrets" not in path.parts]
    assert {"mlflow.log", "postgres.log", "worker-cpu.log", "adapter_model.safetensors"} <= {
        path.name for path in files
    }
    for text in (*dumps, *(path.read_bytes() for path in files)):
        assert database.password.encode() not in text


def dump(database: Server, name: str) -> bytes:
    """All that a database holds."""
    command = [str(database.bin / "pg_dump"), database.url(name).replace("+psycopg", "")]
    return subprocess.run(command, check=True, capture_output=True).stdout


@needs_postgres
@pytest.mark.slow
def test_the_migration_does_what_is_left_to_do_and_never_goes_back(services: Stack) -> None:
    database, names = services.database, ("optuna", "mlflow", "mlflow_s3")
    assert [services.log("migrate").count(f"made database {name}\n") for name in names] == [1] * 3
    versions = [database.psql("SELECT * FROM alembic_version", name) for name in names]

    database.psql("DROP DATABASE optuna")  # the one that is made again in the least time
    services.start("migrate")
    services.wait_until_done("migrate")
    assert [services.log("migrate").count(f"made database {name}\n") for name in names] == [2, 1, 1]
    assert [database.psql("SELECT * FROM alembic_version", name) for name in names] == versions

    database.psql("UPDATE alembic_version SET version_num = 'of-tomorrow'", "optuna")
    services.start("migrate")
    assert services.processes.pop("migrate")[-1].wait() == 1
    assert "of-tomorrow" in services.log("migrate")
    database.psql(f"UPDATE alembic_version SET version_num = '{versions[0]}'", "optuna")

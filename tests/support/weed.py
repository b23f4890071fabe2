"""SeaweedFS, an S3 server that KFP ships itself, started on free ports of this machine."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
from botocore.client import BaseClient
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.session import get_session

from tests.support.ports import free_ports

KEYS = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "tester-secret"}


class Weed:
    """`start`, `kill` (as by a power cut) and `stop` of one server over one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "s3.json").write_text(
            json.dumps(
                {
                    "identities": [
                        {
                            "name": "tester",
                            "credentials": [{"accessKey": KEYS["AWS_ACCESS_KEY_ID"], "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]}],
                            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
                        }
                    ]
                }
            )
        )
        free = iter(free_ports(8))
        self.ports = {
            name: next(free)
            for server in ("master", "volume", "filer", "s3")
            for name in (f"{server}.port", f"{server}.port.grpc")
        }
        self.endpoint = f"http://127.0.0.1:{self.ports['s3.port']}"
        self.process: subprocess.Popen | None = None

    def start(self) -> "Weed":
        weed = Path(sys.executable).parent / "weed"
        ports = [f"-{name}={port}" for name, port in self.ports.items()]
        command = [weed, "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={self.folder}", "-s3", *ports]
        command += [
            f"-s3.config={self.folder}/s3.json",
            "-volume.max=100",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-master.electionTimeout=1s",
            "-master.heartbeatInterval=100ms",
            "-master.volumeSizeLimitMB=128",
        ]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder)
        client = get_session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
            config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10),
        )
        for _ in range(600):
            if self.process.poll() is not None:
                break
            try:
                self._store_and_read(client)
                return self
            except (BotoCoreError, ClientError):
                time.sleep(0.1)
        raise RuntimeError((self.folder / "log").read_text()[-2000:])

    def _store_and_read(self, client: BaseClient) -> None:
        """Raises until the server serves objects: it listens before it has found its volumes, and then answers with internal errors."""
        with contextlib.suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket="ready")
        client.put_object(Bucket="ready", Key="probe", Body=b"ready")
        client.get_object(Bucket="ready", Key="probe")["Body"].read()

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def enter(self, monkeypatch: pytest.MonkeyPatch, bucket: str) -> s3fs.S3FileSystem:
        """Points this process at the server, as a user's environment would, and makes `bucket`.

        s3fs keeps its file systems by their arguments, which do not name the endpoint: one of an earlier server would be taken.
        """
        for name, value in self.environment().items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        fs = s3fs.S3FileSystem()
        if not fs.exists(bucket):
            fs.mkdir(bucket)
        return fs

    def environment(self) -> dict[str, str]:
        return KEYS | {"AWS_ENDPOINT_URL": self.endpoint, "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "2"}


@pytest.fixture(scope="session")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    """One server for all tests, since it takes seconds to start. A test file has a bucket of its own; whoever kills it starts it again."""
    server = Weed(tmp_path_factory.mktemp("weed")).start()
    yield server
    server.kill()

"""The image of manifests/Dockerfile, built by buildah on Debian's own Python, and a run in it as its user."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import yaml

from tests.support.image import Images, mounted, pip_of_this_machine
from tests.support.tiny import tiny_run

ROOT = Path(__file__).parents[2]
USER = 1000
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A store that holds the image, `xtoken`. Its size and how long it took are printed (`pytest -s`)."""
    if not os.environ.get("XTOKEN_IMAGE"):
        pytest.skip("takes some ten minutes and 10 GB of disk: make image-test")
    if missing := [tool for tool in ("buildah", "debootstrap") if not shutil.which(tool)]:
        pytest.skip(f"{' and '.join(missing)}: not here (Debian has them as packages of these names)")
    images = Images(folder := tmp_path_factory.mktemp("images"))
    images.base("base")
    start = time.monotonic()
    places = ("--ignorefile", "manifests/Dockerfile.dockerignore", "--file", "manifests/Dockerfile")
    given = ("--build-arg", "BASE=localhost/base", "--build-arg", "COMMIT=0123abc")
    images.buildah("bud", *places, *given, *pip_of_this_machine(folder), "--tag", "xtoken", ROOT, log=folder / "log")
    print(f"\nthe image: {images.size('xtoken')} on a base of {images.size('base')}, {time.monotonic() - start:.0f} s")
    yield images
    images.buildah("rm", "--all")
    images.buildah("rmi", "--all", "--force")


def inside(images: Images, *command: object, mounts: tuple[str, ...] = ()) -> str:
    """What a command prints in the image, as the user that the image names."""
    container = images.buildah("from", "localhost/xtoken")
    return images.buildah("run", *mounted(mounts), container, "--", *command)


def test_the_user_is_no_root_and_writes_at_home_only(images):
    script = "id -u; pwd; touch here && echo writes; touch /opt/xtoken/x /usr/x 2>/dev/null || echo refused; echo $XTOKEN_COMMIT; cc --version"
    lines = inside(images, "sh", "-c", script).splitlines()
    assert lines[:5] == ["1000", "/home/xtoken", "writes", "refused", "0123abc"]
    assert len(lines) > 5  # Triton's compiler


def test_a_tiny_spec_runs_in_it(images, tmp_path):
    """The whole workflow, each step by KFP's own executor; what it writes is its user's."""
    spec = tiny_run(tmp_path, teachers=1) | {"evaluation": {"bits_per_byte": False}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    for path in (tmp_path, *tmp_path.rglob("*")):
        os.chown(path, USER, USER)
    folder = str(tmp_path)
    told = inside(images, "xtoken", "run", f"{folder}/spec.yaml", "--runs", f"{folder}/runs", mounts=(f"{folder}:{folder}",))
    assert re.search(r"report: +done|report: done", told), told
    config = tmp_path / "out" / "student" / "last" / "config.json"
    assert config.stat().st_uid == USER and (tmp_path / "out" / "report.html").exists()


def test_it_carries_its_bill_of_materials(images):
    """Every distribution of the constraints that is installed, under the version that they pin; the tool itself is not in it."""
    bill = json.loads(inside(images, "cat", "/opt/xtoken/sbom.cdx.json"))
    assert bill["bomFormat"] == "CycloneDX"
    found = {re.sub(r"[-_.]+", "-", part["name"]).lower(): part["version"] for part in bill["components"]}
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if re.match(r"[\w.-]+==", line))
    pinned = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    assert {"torch", "transformers", "kfp", "xtoken-pipelines"} <= set(found) and "cyclonedx-bom" not in found
    wrong = {name: version for name, version in found.items() if name in pinned and version.split("+")[0] != pinned[name]}
    assert wrong == {}

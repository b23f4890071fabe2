"""A root file system that is read-only but for named places, as a container's is with readOnlyRootFilesystem: a mount namespace."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

OF_KFP = ("/gcs", "/s3", "/minio", "/.local", "/.cache", "/.config")
"""Where KFP's compiler mounts empty folders in every step's pod (backend/src/v2/compiler/argocompiler/container.go, 2.17)."""

CLAIM = "/claim"
"""Where the folder of `within` is mounted."""

_SCRIPT = """
set -e
root=$1 folder=$2 writable=$3 needed=$4; shift 4
mount -t tmpfs tmpfs "$root"
for place in /*; do
  case $place in /tmp | /home | /mnt) continue ;; esac
  if [ -L "$place" ]; then cp -P "$place" "$root/"
  elif [ -d "$place" ]; then mkdir "$root$place"; mount --rbind -o ro "$place" "$root$place"; fi
done
mkdir "$root/claim"
mount --bind "$folder" "$root/claim"
for place in $writable; do mkdir -p "$root$place"; mount -t tmpfs -o mode=1777 tmpfs "$root$place"; done
for place in $needed; do
  if ! [ -e "$root$place" ]; then mkdir -p "$root$place"; mount --bind -o ro "$place" "$root$place"; fi
done
mount -o remount,bind,ro "$root"
exec chroot "$root" env HOME=/home/xtoken "$@"
"""


def available() -> bool:
    """Whether this user may make mount namespaces."""
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


def within(root: Path, folder: Path, writable: Sequence[str], *command: object) -> subprocess.CompletedProcess:
    """Runs a command where only `writable`, OF_KFP and `folder`, at CLAIM, can be written to; `root`: an empty folder to build it in."""
    places, needed = " ".join([*writable, *OF_KFP]), f"{Path.cwd()} {sys.prefix} {sys.base_prefix}"  # which may lie in /tmp
    started = ["unshare", "--mount", "sh", "-c", _SCRIPT, "sh", root, folder, places, needed, *command]
    return subprocess.run([str(word) for word in started], capture_output=True, text=True, timeout=550)

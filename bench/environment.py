"""The environment a benchmark was run in."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from .. import hardware
from .._version import __version__


@dataclass(frozen=True)
class Environment:
    """Where and how a benchmark was run.

    Attributes
    ----------
    fastrnn, torch, triton, python : str
        Versions; `triton` is 'none' if it is not installed.
    cudnn, driver : str
        Versions; 'none' on a CPU.
    device : str
        Name of the GPU or the CPU.
    device_type : {'cpu', 'cuda'}
    threads : int
        Number of threads torch uses on the CPU.
    date : str
        UTC, ISO 8601.
    commit : str
        Short hash of fastrnn's checkout, or 'unknown'.
    dirty : bool
        Whether the checkout had uncommitted changes.
    command : str
        Command line that repeats the benchmark.
    """

    fastrnn: str
    torch: str
    triton: str
    cudnn: str
    driver: str
    python: str
    device: str
    device_type: str
    threads: int
    date: str
    commit: str
    dirty: bool
    command: str


def environment(device: torch.device, command: str) -> Environment:
    """Describe the environment of this process.

    Parameters
    ----------
    device : torch.device
    command : str

    Returns
    -------
    Environment
    """
    commit, dirty = checkout()
    return Environment(
        fastrnn=__version__,
        torch=torch.__version__,
        triton=version("triton"),
        cudnn=str(torch.backends.cudnn.version()) if device.type == "cuda" else "none",
        driver=driver() if device.type == "cuda" else "none",
        python=platform.python_version(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else hardware.cpu().name,
        device_type=device.type,
        threads=torch.get_num_threads(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=commit,
        dirty=dirty,
        command=command,
    )


def version(package: str) -> str:
    """Look up the version of an installed package.

    Parameters
    ----------
    package : str

    Returns
    -------
    str
        The version, or 'none' if the package is not installed.
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def driver() -> str:
    """Query nvidia-smi for the version of the NVIDIA driver.

    Returns
    -------
    str
        The version, or 'unknown' if nvidia-smi fails.
    """
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(
            query, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=10
        ).stdout.split()
    except (OSError, subprocess.SubprocessError):
        found = []
    return found[0] if found else "unknown"


def checkout() -> tuple[str, bool]:
    """Look up the commit of fastrnn's checkout.

    Returns
    -------
    commit : str
        Short hash, or 'unknown' if this is not a checkout.
    dirty : bool
        Whether it has uncommitted changes.
    """

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", *args],
            cwd=here.parent,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=True,
        )
        return done.stdout.strip()

    here = Path(__file__).resolve()
    try:
        # Fails if fastrnn is installed inside another project's checkout.
        git("ls-files", "--error-unmatch", here.name)
        described = git("describe", "--always", "--dirty", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return "unknown", False
    return described.removesuffix("-dirty"), described.endswith("-dirty")

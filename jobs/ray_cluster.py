"""A Ray cluster to run on: a connection to one, or one of this machine alone; and what it has room for."""

import hashlib
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from jobs.cpus import available_cpus
from jobs.errors import InterruptedBySignalError, RunError, UsageError
from jobs.runner import workers_per_gpu

START_TRIES = 3
ANSWER_WITHIN_S, HEAD_ANSWER_WITHIN_S = 10.0, 30.0
GPU_ANSWER_WITHIN_S = 60.0
OBJECT_STORE_BYTES = 100 * 2**20
"""Only rows cross it."""

TOKEN_HINT = (
    "set RAY_AUTH_MODE=token, and put what `ray get-auth-token` prints on the head's machine into RAY_AUTH_TOKEN "
    "or ~/.ray/auth_token here"
)

CODE, PACKAGES = Path(__file__).resolve().parents[1], ("classifier", "jobs", "models", "pipeline")


@dataclass(frozen=True)
class Needs:
    """What one worker asks of the cluster."""

    cpus: int
    on_gpu: bool = False
    sharers: int = 1
    """Workers that have the memory of a GPU, or of a node without, together."""

    @property
    def gpus(self) -> float:
        """The share of one."""
        return self.on_gpu / self.sharers

    def __str__(self) -> str:
        return f"{self.cpus} CPU{'s' * (self.cpus != 1)}" + (f" and {self.gpus:.2g} GPU" if self.on_gpu else "")


def measure_room(
    nodes: Sequence[dict[str, Any]],
    *,
    device: str,
    threads: int,
    gpu_bytes: int = 0,
    least_bytes: int = 0,
    wanted: int | None = None,
) -> tuple[Needs, int]:
    """What one worker asks for, and how many workers the cluster's living nodes have room for.

    Args:
        nodes: as from `ray.nodes()`.
        device: `cpu` or `cuda`.
        threads: CPUs that a worker can use.
        gpu_bytes: memory of a GPU; several workers get one if there is enough of it, and CPUs for each. Nodes with
            fewer CPUs than GPUs have no say in their number.
        least_bytes: of it that each of them needs.
        wanted: workers at most; they share only what there are too few of for them.

    Raises:
        UsageError: no node can hold one worker; the message says what is missing.
    """
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    cpus, gpus = ([int(each.get(name, 0)) for each in resources] for name in ("CPU", "GPU"))
    if device == "cuda":
        fit = [(cpu, gpu) for cpu, gpu in zip(cpus, gpus, strict=True) if 0 < gpu <= cpu]
        share = min((cpu // gpu for cpu, gpu in fit), default=1 if any(gpus) else threads)
        sharers = workers_per_gpu(share, gpu_bytes, least_bytes=least_bytes)
        if wanted is not None and fit:
            sharers = min(sharers, max(1, -(-wanted // sum(gpu for _, gpu in fit))))
        needs = Needs(cpus=max(1, min(threads, share // sharers)), on_gpu=True, sharers=sharers)
    else:
        most = max([1, *(cpu // threads for cpu in cpus)])
        needs = Needs(cpus=threads, sharers=min(most, wanted or most))
    room = sum(
        min(cpu // needs.cpus, gpu * needs.sharers if needs.on_gpu else cpu)
        for cpu, gpu in zip(cpus, gpus, strict=True)
    )
    if room == 0:
        found = ", ".join(f"{cpu} CPUs and {gpu} GPUs" for cpu, gpu in zip(cpus, gpus, strict=True)) or "no node"
        raise UsageError(
            f"a worker needs {needs} on one node, but the Ray cluster has: {found}. "
            "Start the cluster with more, lower OMP_NUM_THREADS, choose another --device, or use --engine local."
        )
    return needs, room


def code_digest() -> str:
    """128 bits over the sources of the project's packages that this process runs, in hexadecimal.

    Not the version, which stays the same from one change of a checkout to the next.
    """
    digest = hashlib.blake2b(digest_size=16)
    for package in PACKAGES:
        for path in sorted((CODE / package).rglob("*.py")):
            digest.update(f"{path.relative_to(CODE).as_posix()}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def require_code(digest: str) -> None:
    """Raises RunError if the code here is not what has this digest."""
    if code_digest() != digest:
        raise RunError(
            f"all machines of a run need the same dfpir: on {socket.gethostname()}, the code in {CODE} is not that of "
            "the submitting machine"
        )


def gpu_bytes() -> int:
    """Memory of a GPU of the connected cluster, as a node says that has one; 0 if none answers soon."""
    asked = ray.remote(num_cpus=0, num_gpus=0.01)(_gpu_bytes_here).remote()
    try:
        return int(ray.get(asked, timeout=GPU_ANSWER_WITHIN_S))
    except RayError:
        ray.cancel(asked)
        return 0


def _gpu_bytes_here() -> int:
    import torch

    from models.memory import total_bytes

    return total_bytes(torch.device("cuda"))


def all_nodes() -> list[dict[str, Any]]:
    """Ray's record of each node, living or dead, of the connected cluster."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call] # Ray's hints leave it out
    return nodes


@contextmanager
def connected(address: str | None, *, threads: int) -> Iterator[None]:
    """A connection to a cluster: the one this process already has, the one at `address`, or one started here.

    While it is open, what is printed goes to stderr: Ray prints deaths to stdout, which is for a command's result.
    """
    if ray.is_initialized():
        yield
        return
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    on_sigterm = signal.getsignal(signal.SIGTERM)
    address = address or os.environ.get("RAY_ADDRESS") or None
    try:
        if address is None:
            start_local(cpus=max(available_cpus(), threads))
        else:
            _join(address)
    except SystemExit as end:  # Ray's own handler, until it is replaced below
        if end.code != signal.SIGTERM:
            raise
        raise InterruptedBySignalError(signal.SIGTERM) from None
    with redirect_stdout(sys.stderr):
        try:
            # Ray has put a handler in its place that ends the process without a word.
            if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_sigterm)
            yield
        finally:
            ray.shutdown()  # which prints the deaths that it has held back


def _join(address: str) -> None:
    """Connects to the cluster at `address`; raises UsageError if there is none."""
    try:
        _check_answers(address)
        with _nothing_to_import():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        # Ray's client is given no answer without a token.
        waited = "client connection timeout" in str(error) and os.environ.get("RAY_AUTH_MODE") != "token"
        hint = f"; if it asks for a token, {TOKEN_HINT}" if waited else ""
        raise UsageError(f"no Ray cluster answers at {address}: {error}{hint}") from error


def _check_answers(address: str) -> None:
    """Raises OSError where nothing listens at [ray://]HOST:PORT, or no Ray head where it should.

    Raises UsageError where a head wants another token, or one at all.

    Ray would try for minutes, deaf to signals. By itself it sends a token to no address but `auto`, and so do we.
    """
    if place := re.fullmatch(r"(ray://)?\[?([^/]+?)\]?:(\d{1,5})", address):
        socket.create_connection((place[2], int(place[3])), timeout=ANSWER_WITHIN_S).close()
        if place[1]:
            return
        ask = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"
        # In a process of its own, since Ray ends the one that waits for an answer in vain.
        command = [sys.executable, "-c", ask, address]
        try:
            asked = subprocess.run(command, capture_output=True, text=True, cwd=os.sep, timeout=HEAD_ANSWER_WITHIN_S)
            fault = asked.stderr.strip().rpartition("\n")[2] if asked.returncode else ""
        except subprocess.TimeoutExpired:
            fault = f"RpcError: no word in {HEAD_ANSWER_WITHIN_S:.0f} s"
        if "InvalidAuthToken" in fault:
            raise UsageError(f"the Ray head at {address} asks for a token; {TOKEN_HINT}")
        if "RpcError" in fault:  # any other is told better by `ray.init`
            raise OSError(
                f"something else than a Ray head answers there ({fault}); "
                "the head's port is usually 6379, and 10001 needs ray://"
            )


def _nothing_to_import() -> chdir[str]:
    """A working directory without packages: Ray has workers import from the driver's before anything installed.

    A folder there named `models`, as many repositories have one, would be taken for this project's package.
    """
    return chdir(os.sep)


def start_local(*, cpus: int) -> None:
    """Starts a cluster of this one machine and connects to it; raises RunError when Ray does not come up."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray would have workers run at 15: beside other programs hardly at all (decision 34).
    os.environ.setdefault("RAY_worker_niceness", "0")
    for attempt in range(1, START_TRIES + 1):
        try:
            with _nothing_to_import():
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=OBJECT_STORE_BYTES,
                )
            return
        except Exception as error:
            # Ray gives its processes 15 s to start, fixed (ray-project/ray#65983): on a busy machine that may be
            # too short, above all the first time, when nothing is in the file cache yet.
            ray.shutdown()
            if isinstance(error, OSError) and error.filename:
                # Ray puts a token into the home folder. Where that cannot be written, any will do that is only here.
                os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            if attempt == START_TRIES:
                raise RunError(
                    f"Ray could not be started on this machine in {START_TRIES} tries ({error}); "
                    "end other work on it, make room where it keeps its files (TMPDIR, else /tmp), give --address of a "
                    "running cluster, or use --engine local"
                ) from error

"""A Python that has imported what the scripts import, and forks for each script that a test starts.

The imports of a script take five seconds of a core, most tests of a script far less. What is the project's own is
forgotten before the fork and imported anew, so that a script runs all of its own code, from its first line to the
interpreter's end.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
BEFORE_TESTS = dict(os.environ)
SCRIPTS = ("train_lore", "train_po", "evaluate")
# What launchers, examples and a writer of logs import besides.
PACKAGES = (
    "torch.distributed.run",
    "accelerate.commands.accelerate_cli",
    "sklearn.datasets",
    "sklearn.linear_model",
    "tensorboardX",
)


@functools.cache
def warm_python() -> str:
    """Starts the server for this session. Returns an executable that takes the words of `python` and the same flags."""
    from tests.warm_client import at_import

    folder = Path(tempfile.mkdtemp(prefix="warm-python-"))
    executable = folder / "python"
    client = (ROOT / "tests/warm_client.py").read_text(encoding="utf-8")
    executable.write_text(f"#!{sys.executable} -SE\n{client}", encoding="utf-8")
    executable.chmod(0o755)
    environment = script_environment(BEFORE_TESTS)
    plain = {name: value for name, value in environment.items() if not name.startswith("COVERAGE_")}
    note = {"python": sys.executable, "environment": at_import(environment)}
    (folder / "server.json").write_text(json.dumps(note), encoding="utf-8")
    command = [sys.executable, __file__, str(folder)]
    server = subprocess.Popen(command, env=plain, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout.readline() == b"ready\n"

    def end() -> None:
        server.stdin.close()
        server.wait()

    atexit.register(end)
    return str(executable)


def script_environment(around: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a test's script sees: no launcher around the tests, one thread."""
    inherited = {name: value for name, value in around.items() if not name.startswith("ACCELERATE_")}
    return inherited | {"OMP_NUM_THREADS": "1"}


def serve(folder: str) -> None:
    """Returns in each process that is to run a script, after it took the caller's streams, folder and environment."""
    sys.path.insert(0, str(ROOT))
    for module in (*SCRIPTS, *PACKAGES):
        importlib.import_module(module)
    for name in list(sys.modules):
        if name.partition(".")[0] in ("utils", *SCRIPTS):
            del sys.modules[name]
    sys.path.remove(str(ROOT))
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{folder}/socket")
    listener.listen()
    os.write(1, b"ready\n")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that attend
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # sent to all: who attends still has a script to kill
        signal.signal(number, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if listener not in ready:  # the session has ended, in whatever way
            shutil.rmtree(folder)
            os._exit(0)
        connection, _ = listener.accept()
        if not os.fork():
            break
        connection.close()
    listener.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 4)
    script = os.fork()
    if script:
        attend(connection, script)
    os.setpgid(0, 0)  # with its data workers
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    connection.close()
    with os.fdopen(descriptors[3]) as file:
        file.seek(0)
        request = json.load(file)
    for number, descriptor in enumerate(descriptors[:3]):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = request["words"]
    sys.executable = f"{folder}/python"


def attend(connection: socket.socket, script: int) -> NoReturn:
    """Hands signals on to the script, kills it where its caller is gone, says how it ended."""

    def listen() -> None:
        with contextlib.suppress(OSError):  # it has ended, or the caller has
            while number := connection.recv(1):
                os.kill(script, number[0])
            os.killpg(script, signal.SIGKILL)

    threading.Thread(target=listen, daemon=True).start()
    _, status = os.waitpid(script, 0)
    with contextlib.suppress(OSError):
        connection.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def become() -> None:
    """Runs the script or module that sys.argv names, as `python` does."""
    if any(name.startswith("COVERAGE_PROCESS_") for name in os.environ):
        import coverage

        coverage.process_startup()
    sys.path.pop(0)  # of this file
    if sys.argv[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv.pop(0)
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
    become()

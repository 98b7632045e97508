"""Stands in for `python` in tests: hands a script to the server of tests/warm_python.py, and ends as the script does.

A copy of it under the line "#!python" of the session is the executable. Anything but a script or a module, or one for
which the environment was changed in what packages may read when they are imported, goes to Python itself.
"""

import json
import os
import signal
import socket
import sys

# Variables that launchers set, and that nothing reads before a script runs.
RUNTIME = (
    "_", "ACCELERATE_", "COVERAGE_", "GROUP_", "KMP_", "LOCAL_", "MASTER_", "MIXED_PRECISION", "OMPI_", "PYTEST_",
    "PYTORCH_NVML_", "RANK", "ROLE_", "TORCHELASTIC_", "TORCHINDUCTOR_", "TORCH_NCCL_", "WORLD_SIZE",
)  # fmt: skip


def at_import(environment: dict[str, str]) -> dict[str, str]:
    """What packages may read; without the working directory in PYTHONPATH, where accelerate puts it for DeepSpeed."""
    found = {name: value for name, value in environment.items() if not name.startswith(RUNTIME)}
    folders = environment.get("PYTHONPATH", "").split(os.pathsep)
    return found | {"PYTHONPATH": os.pathsep.join(folder for folder in folders if folder not in ("", os.getcwd()))}


def main() -> None:
    folder = os.path.dirname(os.path.realpath(__file__))
    with open(f"{folder}/server.json", encoding="utf-8") as file:
        server = json.load(file)
    words = [word for word in sys.argv[1:2] if word != "-u"] + sys.argv[2:]
    is_program = bool(words) and (words[0].endswith(".py") or words[0] == "-m")
    if not is_program or at_import(dict(os.environ)) != server["environment"]:
        os.execv(server["python"], [server["python"], *sys.argv[1:]])
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(f"{folder}/socket")
    with os.fdopen(os.memfd_create("request"), "w+") as request:
        json.dump({"words": words, "environment": dict(os.environ), "folder": os.getcwd()}, request)
        request.flush()
        socket.send_fds(connection, [b"x"], [0, 1, 2, request.fileno()])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, _: connection.send(bytes([number])))
    status = int(connection.recv(16).decode() or -signal.SIGKILL)
    if status < 0:  # ended by a signal
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    main()

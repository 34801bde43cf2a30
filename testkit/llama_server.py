"""llama.cpp's own server, from the wheel `xllamacpp`, with a model in a file: a real model server.

`python -m testkit.llama_server PORT FILE NAME` serves the model in FILE (GGUF) as NAME on 127.0.0.1, until it is ended
by a signal. Its errors go to standard error.
"""

import os
import signal
import sys
from pathlib import Path

from testkit.ports import LOOPBACK, free_port
from testkit.processes import Process, python

CONTEXT = 2048
"""Tokens of a prompt and its answer."""
CALLS = 2
"""Answered at a time; further ones wait."""
MAX_TOKENS = 512
"""Of an answer: small models do not always find an end."""
TEMPERATURE = 0.2
ERRORS = 1
"""llama.cpp's number for how much it logs."""


class LlamaServer(Process):
    """The server as a process, at a free port; it is ready when it has loaded its model.

    Attributes:
        url: Of its API, without `/v1`.
    """

    def __init__(self, name: str, folder: Path, file: Path) -> None:
        self.port = free_port()
        self.url = f"http://{LOOPBACK}:{self.port}"
        command = python("testkit.llama_server", str(self.port), str(file), name)
        super().__init__(name, command, env={}, folder=folder, ready_url=f"{self.url}/health")


def main(port: int, file: str, name: str) -> None:
    """Serve until a signal ends the process."""
    import xllamacpp  # noqa: PLC0415 - this program alone needs it

    parameters = xllamacpp.CommonParams()
    parameters.hostnames, parameters.port = [LOOPBACK], port
    parameters.model.path, parameters.model_alias = file, {name}
    parameters.n_ctx, parameters.n_parallel, parameters.n_predict = CONTEXT * CALLS, CALLS, MAX_TOKENS
    parameters.sampling.temp = TEMPERATURE
    threads = max(1, (os.cpu_count() or 1) // 2)
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.n_threads_http, parameters.verbosity = 4, ERRORS
    parameters.offline, parameters.ui, parameters.use_jinja = True, False, True
    server = xllamacpp.Server(parameters)
    print(f"listening on {server.listening_address}", flush=True)
    signal.pause()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])

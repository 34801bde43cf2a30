"""llama.cpp's own HTTP server on 127.0.0.1, from the wheel `xllamacpp`; it ends by SIGTERM.

python llama_server.py PORT MODEL.gguf [name=value ...]     further names of llama.cpp's parameters, such as n_ctx=2048
"""

import signal
import sys

import xllamacpp


def parsed(text: str, default: object) -> object:
    """Return the value that a text means for a parameter with such a default."""
    if isinstance(default, bool):
        return text == "true"
    if isinstance(default, int):
        return int(text)
    return text if isinstance(default, str) else getattr(type(default), text)


def main() -> None:
    """Serve until a signal comes."""
    port, model, *pairs = sys.argv[1:]
    parameters = xllamacpp.CommonParams()
    parameters.hostnames, parameters.port, parameters.model.path = ["127.0.0.1"], int(port), model
    parameters.n_ctx, parameters.n_parallel, parameters.n_threads_http = 65536, 2, 4
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.offline, parameters.ui, parameters.use_jinja = True, False, True
    for pair in pairs:
        name, _, text = pair.partition("=")
        default = getattr(parameters, name)
        setattr(parameters, name, parsed(text, default))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    server = xllamacpp.Server(parameters)
    print("listening on", server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()

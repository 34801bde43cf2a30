"""Post one prompt to a gateway and print its answer, its headers and the address of its trace in Jaeger.

Standard library only. A gateway with keys is given one by the variable `GATEWAY_API_KEY`.
"""

import argparse
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from email.message import Message
from urllib.parse import urlsplit

SHOWN = ("x-request-id", "x-trace-id", "x-gateway-attempts", "x-gateway-backend", "server-timing", "retry-after")
# The gateway is asked directly, whatever proxy the environment names for the world outside.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def arguments() -> argparse.Namespace:
    """Read the command line; the ports are those of compose.yaml."""
    gateway = f"http://127.0.0.1:{os.environ.get('GATEWAY_PORT') or 8000}"
    jaeger = f"http://127.0.0.1:{os.environ.get('JAEGER_PORT') or 16686}"
    parser = argparse.ArgumentParser(prog="trace", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("prompt", nargs="*", default=["Why do language models fail in the middle of a sentence?"])
    parser.add_argument("--url", default=gateway, help="the gateway (%(default)s)")
    parser.add_argument("--jaeger", default=jaeger, help="Jaeger's web page (%(default)s)")
    parser.add_argument(
        "--model", default=os.environ.get("MODEL_NAME") or "demo-model", help="the model to ask for (%(default)s)"
    )
    parser.add_argument("--stream", action="store_true", help="ask for a stream")
    chosen = parser.parse_args()
    if urlsplit(chosen.url).scheme not in {"http", "https"}:
        parser.error(f"--url {chosen.url} is no http:// or https:// address")
    return chosen


def post(chosen: argparse.Namespace) -> tuple[int, Message, str]:
    """Post the prompt; return the answer's status, headers and body. Raises: OSError."""
    messages = [{"role": "user", "content": " ".join(chosen.prompt)}]
    body = {"model": chosen.model, "messages": messages, "stream": chosen.stream}
    headers = {"content-type": "application/json"}
    if key := os.environ.get("GATEWAY_API_KEY"):
        headers["authorization"] = f"Bearer {key}"
    url = f"{chosen.url.rstrip('/').removesuffix('/v1')}/v1/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # noqa: S310  its scheme was checked
    try:
        with DIRECT.open(request, timeout=630) as answer:
            return answer.status, answer.headers, _rest_of(answer).decode(errors="replace")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read().decode(errors="replace")


def _rest_of(answer: http.client.HTTPResponse) -> bytes:
    """The body, as far as it came: after an error event it has no proper end."""
    try:
        return answer.read()
    except http.client.IncompleteRead as end:
        return end.partial


def readable(body: str) -> str:
    """The completion's text, or the error's code and message, or the body as it is."""
    if body.startswith("{"):
        documents = [json.loads(body)]
    else:
        lines = (line[5:].strip() for line in body.splitlines() if line.startswith("data:"))
        documents = [json.loads(line) for line in lines if line != "[DONE]"]
    text = ""
    for document in documents:
        if error := document.get("error"):
            text += f"[{error['code']}] {error['message']}"
        for choice in document.get("choices", ()):
            text += (choice.get("message") or choice.get("delta") or {}).get("content") or ""
    return text or body


def main() -> int:
    """Return the exit code: 0 for a good answer, 1 for any other."""
    chosen = arguments()
    started = time.monotonic()
    try:
        status, headers, body = post(chosen)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        print(f"no answer from {chosen.url}: {reason} (is it up? make up)", file=sys.stderr)
        return 1
    try:
        text = readable(body)
    except (ValueError, AttributeError, KeyError, TypeError):
        text = body
    print(f"{status} in {time.monotonic() - started:.2f} s\n\n{text}\n")
    for name in SHOWN:
        if value := headers.get(name):
            print(f"{name}: {value}")
    if trace_id := headers.get("x-trace-id"):
        print(f"\ntrace: {chosen.jaeger.rstrip('/')}/trace/{trace_id}")
    return 0 if status < 400 and '\ndata: {"error"' not in body else 1


if __name__ == "__main__":
    sys.exit(main())

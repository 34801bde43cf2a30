"""Real model servers, each as a process of its own, from the environment that `make test-real` makes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from testkit import REPOSITORY
from testkit.http import ask
from testkit.ports import LOOPBACK, free_port
from testkit.processes import Process

HERE = Path(__file__).parent
ENVIRONMENT = REPOSITORY / ".venv-real" / "bin"
"""Where the programs of `requirements/real.txt` are."""
PATIENCE = 120.0
"""Seconds for a server to come up: far more than a busy machine needs."""

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SLOW_TO_LOAD = (
    "{% if messages|length == 4 %}{% for a in range(10) %}{% for b in range(1000) %}{% for c in range(1000) %}"
    "{% endfor %}{% endfor %}{% endfor %}{% endif %}" + CHAT_TEMPLATE
)
"""A chat template that keeps llama.cpp loading for seconds: before it is ready it formats an example of four messages."""


class Server(Process):
    """A real server; see `Process`. Its port is a free one and stays the same through all of its lives.

    Attributes:
        url: Of its API, without `/v1`.
    """

    def __init__(self, name: str, folder: Path, port: int, command: list[str], env: Mapping[str, str], ready: str) -> None:
        self.url = f"http://{LOOPBACK}:{port}"
        super().__init__(name, command, env=env, folder=folder, ready_url=self.url + ready)

    async def ready(self, seconds: float = PATIENCE) -> None:
        await super().ready(seconds)


class Llama(Server):
    """llama.cpp's server with a tiny model.

    Args:
        folder: Where its output goes.
        model: The model's file.
        parameters: Of llama.cpp, by their names there.
    """

    def __init__(self, name: str, folder: Path, model: Path, **parameters: object) -> None:
        port = free_port()
        pairs = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in parameters.items()]
        program = [str(ENVIRONMENT / "python"), str(HERE / "llama_server.py"), str(port), str(model), *pairs]
        super().__init__(name, folder, port, program, {}, "/health")

    async def slots(self) -> list[dict[str, Any]]:
        """Return what its slots are doing."""
        slots: list[dict[str, Any]] = (await ask(f"{self.url}/slots", seconds=PATIENCE)).json
        return slots

    async def busy(self) -> int:
        """Return how many of its slots compute."""
        return sum(slot["is_processing"] for slot in await self.slots())


class LiteLlm(Server):
    """LiteLLM's proxy with one model, `tiny`, behind an OpenAI-compatible server at `backend`.

    Attributes:
        key: What it asks of callers.
    """

    key = "sk-test-of-the-gateway-0123456789"

    def __init__(self, folder: Path, backend: str) -> None:
        port = free_port()
        config = folder / "litellm.yaml"
        model = {"model": "openai/tiny", "api_base": f"{backend}/v1", "api_key": "none"}
        config.write_text(json.dumps({"model_list": [{"model_name": "tiny", "litellm_params": model}]}))  # JSON is YAML
        program = [str(ENVIRONMENT / "litellm"), "--config", str(config), "--host", LOOPBACK, "--port", str(port)]
        env = {"LITELLM_MASTER_KEY": self.key, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        super().__init__("litellm", folder, port, program, env, "/health/liveliness")

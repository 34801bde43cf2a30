"""Real model servers, each as a process of its own, from the environment that `make test-real` makes."""

import json
from collections.abc import Mapping
from pathlib import Path

from testkit import REPOSITORY
from testkit.http import ask
from testkit.llama_server import LlamaServer
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
TEXT = "Say something."
"""What tests ask."""
SLOW_TO_LOAD = (
    f"{{% if messages[0]['content'] != '{TEXT}' %}}"
    "{% for a in range(40) %}{% for b in range(1000) %}{% endfor %}{% endfor %}{% endif %}" + CHAT_TEMPLATE
)
"""Keeps llama.cpp loading for some seconds: before it is ready it tries its template with messages of its own."""


class Llama(LlamaServer):
    """llama.cpp's server with a tiny model and room for answers that take long; see `LlamaServer`."""

    def __init__(self, name: str, folder: Path, file: Path, **parameters: str | int | bool) -> None:
        own: dict[str, str | int | bool] = {"n_ctx": 65536, "n_predict": -1, "verbosity": 3}
        super().__init__(name, folder, file, **(own | parameters))

    async def ready(self, seconds: float = PATIENCE) -> None:
        await super().ready(seconds)

    async def busy(self) -> int:
        """Return how many of its slots compute."""
        slots = (await ask(f"{self.url}/slots", seconds=PATIENCE)).json
        return sum(slot["is_processing"] for slot in slots)

    @property
    def cancelled(self) -> int:
        """How many answers it stopped computing because their callers left."""
        return self.output.read_text(encoding="utf-8", errors="replace").count("cancel task")


class LiteLlm(Process):
    """LiteLLM's proxy.

    Args:
        folder: Where its output goes.
        models: For each name of a model the url, without `/v1`, of the OpenAI-compatible server that has it, as `tiny`.

    Attributes:
        key: What it asks of callers.
        url: Of its API, without `/v1`.
    """

    key = "sk-test-of-the-gateway-0123456789"

    def __init__(self, folder: Path, models: Mapping[str, str]) -> None:
        port = free_port()
        self.url = f"http://{LOOPBACK}:{port}"
        config = folder / "litellm.yaml"
        entries = [
            {
                "model_name": name,
                "litellm_params": {"model": "openai/tiny", "api_base": f"{url}/v1", "api_key": "none"},
            }
            for name, url in models.items()
        ]
        config.write_text(json.dumps({"model_list": entries}))  # JSON is YAML
        program = [str(ENVIRONMENT / "litellm"), "--config", str(config), "--host", LOOPBACK, "--port", str(port)]
        env = {"LITELLM_MASTER_KEY": self.key, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        super().__init__("litellm", program, env=env, folder=folder, ready_url=f"{self.url}/health/liveliness")

    async def ready(self, seconds: float = PATIENCE) -> None:
        await super().ready(seconds)

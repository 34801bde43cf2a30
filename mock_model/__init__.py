"""A scriptable OpenAI-compatible mock model: deterministic answers, and faults on command."""

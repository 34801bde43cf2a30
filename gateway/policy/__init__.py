"""Pure state machines with an injected clock and source of chance: no HTTP, no telemetry."""

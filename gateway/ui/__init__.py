"""The live page: its document, and what it shows of the gateway now."""

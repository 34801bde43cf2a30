"""What the gateway costs: measured here, beside a bare pass-through and whatever peers are installed."""

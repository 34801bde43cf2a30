"""Several processes on one port: a parent that starts workers, and speaks for all of them."""

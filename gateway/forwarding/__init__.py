"""The way of a request: which backend is asked, when, and how its answer reaches the caller."""

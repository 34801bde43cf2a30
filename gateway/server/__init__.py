"""The caller's side: listening, reading requests, writing answers."""

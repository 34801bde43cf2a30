"""The backend's side: HTTP calls to replicas."""

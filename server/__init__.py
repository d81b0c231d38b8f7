"""HTTP API, job queue and web page: starts the rooms as worker processes."""

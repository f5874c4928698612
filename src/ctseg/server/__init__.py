"""The annotation server: HTTP APIs and a web page."""

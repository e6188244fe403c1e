"""The cluster file: where settings live and what the machines can carry."""

"""From a finished model to translated and summarised rows: engines, batch jobs, a service."""

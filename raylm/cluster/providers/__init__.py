"""Node providers that Ray's launcher and autoscaler load by `provider: {type: external, module: …}`."""

"""Node providers that Ray's launcher and autoscaler load by `provider: {type: external, module: …}`."""

ENDING = "RAYLM_ENDING"
"""The variable by which `raylm down` tells a provider that nothing is going to be launched."""

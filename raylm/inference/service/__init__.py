"""The service: a model behind HTTP on Ray Serve, for people online and for batch jobs that share it.

Two deployments make one application: a gateway, which checks keys and limits and speaks HTTP, and the replicas of the
model, of which there may be many or none.
"""

"""What stands around the stages: cluster files checked before anything is started."""

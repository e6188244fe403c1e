"""What stands around the stages: clusters checked, planned, made and ended, and the jobs on them."""

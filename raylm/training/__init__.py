"""From token shards to a finished model: objectives, global batches, DeepSpeed ZeRO, checkpoints, scores."""

"""From sources to token shards: clean, filter, deduplicate, tokenise, pack."""

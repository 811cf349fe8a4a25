"""Reading a source checkpoint tensor by tensor, and writing the converted one shard by shard."""

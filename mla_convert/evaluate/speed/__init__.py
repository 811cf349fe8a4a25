"""Speed of a model: decode and prefill times, and the largest batch."""

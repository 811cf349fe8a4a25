"""Reading of source checkpoints: safetensors and GGUF files, quantised tensors, names and shapes."""

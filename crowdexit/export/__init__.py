"""A network as files that run without PyTorch."""
